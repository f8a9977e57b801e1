"""Sampling parameters; responses that depend on weights, prompt and seed alone."""

import numpy as np
import pytest
import torch
from trainer_world import EOS, VOCAB, tiny_model
from transformers import GenerationConfig

from distillm_ext.generation import SamplingParams, generate_responses

PROMPTS = [[1, 5, 6, 7, 8], [1, 9], [1, 10, 11]]


def generate(model, prompts=PROMPTS, params=SamplingParams(), seeds=(10, 11, 12), **options):  # noqa: B008
    settings = dict(max_new_tokens=8, eos_token_ids=(EOS,), seeds=seeds) | options
    return generate_responses(model, prompts, params, **settings)


def stubborn_model(token):
    """A model that always gives `token` nearly all of the probability."""
    model = tiny_model(0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1.0)
    bias = torch.zeros(VOCAB)
    bias[token] = 100.0
    model.lm_head.register_forward_hook(lambda module, args, output: output + bias)
    return model


# ---- parameters


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "sampling.temperature"),
        ({"temperature": float("nan")}, "sampling.temperature"),
        ({"temperature": float("inf")}, "sampling.temperature"),
        ({"top_k": -1}, "sampling.top_k"),
        ({"top_p": 0.0}, "sampling.top_p"),
        ({"top_p": 1.5}, "sampling.top_p"),
        ({"min_p": 1.5}, "sampling.min_p"),
        ({"topk": 3}, "unknown key 'topk'; legal keys are temperature, top_k, top_p, min_p"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams.from_mapping(values)


@pytest.mark.parametrize("values", [{"temperature": "hot"}, {"top_k": 1.5}, {"top_p": True}, {"top_k": True}])
def test_bad_types(values):
    with pytest.raises(TypeError, match=f"sampling.{next(iter(values))}"):
        SamplingParams.from_mapping(values)


# ---- responses


def test_a_row_depends_on_its_own_seed_alone():
    model = tiny_model(3)
    together = generate(model).token_ids
    assert generate(model).token_ids == together
    for row, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], seeds=[10 + row]).token_ids == [together[row]]
    assert generate(model, batch_size=2).token_ids == together
    assert generate(model, seeds=(20, 11, 12)).token_ids[0] != together[0]
    assert generate(model, seeds=(20, 11, 12)).token_ids[1:] == together[1:]


def test_global_generators_neither_matter_nor_move():
    model = tiny_model(3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = generate(model).token_ids
    assert (torch.get_rng_state() == state).all()
    torch.manual_seed(123)
    assert generate(model).token_ids == first


def test_samples_follow_the_model():
    model = tiny_model(3)
    count = 4000
    with torch.no_grad():
        expected = model(torch.tensor([[1, 5]])).logits[0, -1].softmax(-1)
    responses = generate(model, [[1, 5]] * count, seeds=range(count), max_new_tokens=1, eos_token_ids=())
    found = torch.tensor([ids[0] for ids in responses.token_ids]).bincount(minlength=VOCAB) / count
    assert 0.5 * (found - expected).abs().sum() < 0.08


def test_greedy_is_the_argmax_of_the_model_without_padding():
    model = tiny_model(3)
    found = generate(model, params=SamplingParams(temperature=0), seeds=None, eos_token_ids=()).token_ids
    for prompt, response in zip(PROMPTS, found, strict=True):
        ids = list(prompt)
        for token in response:
            with torch.no_grad():
                assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


def test_immediate_eos_is_a_response_of_one_token():
    found = generate(stubborn_model(EOS))
    assert found.token_ids == [[EOS]] * 3 and found.finished == [True] * 3


def test_a_response_without_eos_is_cut_and_marked():
    found = generate(stubborn_model(9))
    assert found.token_ids == [[9] * 8] * 3 and found.finished == [False] * 3


def test_pad_may_be_eos():
    model = tiny_model(3)
    params = SamplingParams(temperature=1.5)
    seeds = range(100, 140)
    prompts = [PROMPTS[row % 3] for row in range(40)]
    plain = generate(model, prompts, params, seeds, pad_token_id=0)
    same = generate(model, prompts, params, seeds, pad_token_id=EOS)
    assert plain == same and len({len(ids) for ids in plain.token_ids}) > 2
    for ids, finished in zip(plain.token_ids, plain.finished, strict=True):
        assert finished == (ids[-1] == EOS) and EOS not in ids[:-1]


def test_every_end_token_ends():
    found = generate(stubborn_model(9), eos_token_ids=(EOS, 9))
    assert found.token_ids == [[9]] * 3


def test_ids_beyond_the_vocabulary_are_never_generated():
    model = stubborn_model(60)
    assert all(max(ids) < 60 for ids in generate(model, vocab_size=60).token_ids)
    assert all(max(ids) < 60 for ids in generate(model, vocab_size=60, params=SamplingParams(temperature=0)).token_ids)


def test_the_models_own_defaults_stay_out_and_come_back():
    model = tiny_model(3)
    expected = generate(model, params=SamplingParams(temperature=0)).token_ids
    own = GenerationConfig(repetition_penalty=5.0, max_length=3, num_beams=2, do_sample=True, suppress_tokens=[9])
    model.generation_config = own
    model.train()
    assert generate(model, params=SamplingParams(temperature=0)).token_ids == expected
    assert model.generation_config is own and model.training


def test_dropout_is_off():
    model = tiny_model(3, attention_dropout=0.9).train()
    assert generate(model).token_ids == generate(tiny_model(3)).token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[1], []], "seeds": (0, 1)}, r"prompts\[1\]"),
        ({"seeds": None}, "one seed per prompt"),
        ({"seeds": (1, 2)}, r"expected one per prompt \(3\), got 2"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(3), **options)


def test_no_prompts_no_responses():
    assert generate(tiny_model(3), [], seeds=()).token_ids == []


def test_seeds_of_any_size():
    seeds = np.array([2**63, 2**63 + 1], dtype=np.uint64)
    found = generate(tiny_model(3), [[1, 5]] * 2, seeds=[int(seed) for seed in seeds], eos_token_ids=()).token_ids
    assert found[0] != found[1]
