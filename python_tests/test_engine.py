"""Engines: the local one, the calls made to vLLM (a stand-in), and the trainer's use of them."""

import sys
from dataclasses import dataclass
from types import SimpleNamespace

import peft
import pytest
import torch
from trainer_world import EOS, VOCAB, logged, tiny_config, tiny_model, tiny_trainer

from distillm_ext.generation import LocalEngine, SamplingParams, VllmEngine, full_weights, generate_responses

PROMPTS = [[1, 5, 6], [1, 9]]
OPTIONS = dict(max_new_tokens=5, eos_token_ids=(EOS,), seeds=(3, 4))


def answers(model):
    return generate_responses(model, PROMPTS, SamplingParams(), **OPTIONS)


def adapted(seed=1):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    torch.manual_seed(5)
    model = peft.get_peft_model(tiny_model(seed), config)
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(0.1)
    return model


# ---- local


def test_the_local_engine_is_the_decode_loop():
    model, entered = tiny_model(1), []

    class Context:
        def __enter__(self):
            entered.append(1)

        def __exit__(self, *error):
            return None

    engine = LocalEngine(lambda: model, batch_size=1, context=Context)
    found = engine.generate(PROMPTS, SamplingParams(), **OPTIONS)
    assert found.token_ids == answers(model).token_ids and entered == [1]


def test_weights_move_into_a_local_engine():
    source, target = tiny_model(1), tiny_model(2)
    engine = LocalEngine(target)
    assert engine.generate(PROMPTS, SamplingParams(), **OPTIONS) != answers(source)
    engine.update_weights(full_weights(source))
    assert engine.generate(PROMPTS, SamplingParams(), **OPTIONS) == answers(source)
    with pytest.raises(ValueError, match="no parameter 'nonsense'"):
        engine.update_weights([("nonsense", torch.ones(1))])
    with pytest.raises(ValueError, match="lm_head.weight has shape"):
        engine.update_weights([("lm_head.weight", torch.ones(1))])
    with pytest.raises(ValueError, match="trained model itself"):
        LocalEngine(source, shares_weights=True).update_weights(full_weights(source))


def test_adapters_are_merged_into_the_weights_and_taken_out_again():
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = LocalEngine(tiny_model(2))
    engine.update_weights(full_weights(model))
    assert engine.generate(PROMPTS, SamplingParams(), **OPTIONS).token_ids == answers(model).token_ids
    assert answers(model).token_ids != answers(tiny_model(1)).token_ids
    assert sorted(name for name, _ in full_weights(model)) == sorted(
        name for name, _ in tiny_model(1).named_parameters()
    )
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])


# ---- vLLM


@dataclass
class Logprob:
    logprob: float


class FakeLLM:
    """Records what it is asked; answers every prompt with its last token, then EOS."""

    def __init__(self, **options):
        self.options, self.calls, self.loaded = options, [], {}
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: VOCAB))

    def generate(self, prompts, sampling_params, use_tqdm):
        self.calls.append((prompts, sampling_params, use_tqdm))
        found = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            tokens = [prompt["prompt_token_ids"][-1], EOS][: params.max_tokens]
            logprobs = [{token: Logprob(-0.5 * index), 63: Logprob(-9.0)} for index, token in enumerate(tokens)]
            reason = "stop" if tokens[-1] in params.stop_token_ids else "length"
            found.append(SimpleNamespace(outputs=[SimpleNamespace(
                token_ids=tuple(tokens), logprobs=logprobs, finish_reason=reason)]))  # fmt: skip
        return found

    def apply_model(self, function):
        return [
            function(SimpleNamespace(load_weights=lambda part: self.loaded.update((n, t.clone()) for n, t in part)))
        ]

    def reset_prefix_cache(self):
        self.calls.append("reset")


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=FakeLLM, SamplingParams=SimpleNamespace))


def test_vllm_requests(vllm):
    engine = VllmEngine("folder", dtype="bfloat16")
    assert engine.llm.options == dict(
        model="folder", dtype="bfloat16", skip_tokenizer_init=True, logprobs_mode="raw_logprobs"
    )
    params = SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1)
    found = engine.generate(
        PROMPTS, params, max_new_tokens=[4, 1], eos_token_ids=(EOS, 7), seeds=(3, 2**64 - 1), vocab_size=60
    )
    assert found.token_ids == [[6, EOS], [9]] and found.finished == [True, False]
    assert found.logprobs == [[0.0, -0.5], [0.0]]
    (prompts, requests, progress) = engine.llm.calls[0]
    assert prompts == [{"prompt_token_ids": prompt} for prompt in PROMPTS] and progress is False
    assert vars(requests[0]) == dict(
        max_tokens=4, seed=3, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, stop_token_ids=[EOS, 7], ignore_eos=True,
        logprobs=0, detokenize=False, allowed_token_ids=list(range(60)),
    )  # fmt: skip
    assert requests[1].max_tokens == 1 and requests[1].seed == 2**63 - 1
    engine.generate(PROMPTS, SamplingParams(temperature=0), max_new_tokens=2, eos_token_ids=(), vocab_size=VOCAB)
    assert engine.llm.calls[1][1][0].allowed_token_ids is None and engine.llm.calls[1][1][0].seed is None
    assert engine.generate([], params, max_new_tokens=2, eos_token_ids=(), seeds=()).token_ids == []


def test_vllm_takes_weights_in_parts(vllm, monkeypatch):
    monkeypatch.setattr("distillm_ext.generation.engines.vllm._PART_BYTES", 4096)
    engine, model = VllmEngine("folder"), tiny_model(1)
    parts = []
    apply_model = engine.llm.apply_model
    engine.llm.apply_model = lambda function: parts.append(1) or apply_model(function)
    engine.update_weights(full_weights(model))
    assert engine.llm.loaded.keys() == dict(model.named_parameters()).keys() and len(parts) > 1
    assert all(torch.equal(engine.llm.loaded[name], value) for name, value in model.named_parameters())
    assert engine.llm.calls == ["reset"] and not engine.shares_weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[1], []]}, r"prompts\[1\]"),
        ({"seeds": None}, "one seed per prompt"),
        ({"seeds": (1,)}, r"expected one per prompt \(2\), got 1"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_vllm_bad_arguments(vllm, options, message):
    settings = dict(prompts=PROMPTS, params=SamplingParams()) | OPTIONS | options
    with pytest.raises(ValueError, match=message):
        VllmEngine("folder").generate(settings.pop("prompts"), settings.pop("params"), **settings)


def test_vllm_is_imported_when_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"distillm_ext\[vllm\]"):
        VllmEngine("folder")


# ---- in the trainer


def test_an_engine_with_weights_of_its_own_trains_as_the_local_one(tmp_path):
    settings = dict(policy="on_policy", max_steps=3)
    plain = tiny_trainer(tiny_config(tmp_path / "plain", **settings))
    plain.train()
    engine = LocalEngine(tiny_model(9), batch_size=4)
    updates = []
    update = engine.update_weights
    engine.update_weights = lambda weights: updates.append(1) or update(weights)
    other = tiny_trainer(tiny_config(tmp_path / "engine", **settings), generation_engine=engine)
    other.train()
    assert len(updates) == 3 and logged(other, "loss") == logged(plain, "loss")
    assert all(0 < share < 1 for share in logged(plain, "time_generation"))
