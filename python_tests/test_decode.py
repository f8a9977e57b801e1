"""The decode loop against `model.generate` and against the model without padding, batch or cache."""

import pytest
import torch
import transformers
from trainer_world import EOS, VOCAB, tiny_model
from transformers import GenerationConfig

from distillm_ext import sample_tokens
from distillm_ext.generation import SamplingParams, generate
from distillm_ext.generation.loop import decode as decode_module
from distillm_ext.generation.loop.progress import FinishedFlags

GREEDY = SamplingParams(temperature=0)
SMALL = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3,
             pad_token_id=0, bos_token_id=1, eos_token_id=EOS)  # fmt: skip
LLAMA = SMALL | dict(intermediate_size=48, num_key_value_heads=1, max_position_embeddings=128)
# What differs in cache, positions, head or signature. GPT-2 has no position beyond the longest text made here.
ARCHITECTURES = {
    "llama": ("Llama", LLAMA),
    "qwen3": ("Qwen3", LLAMA | dict(head_dim=16)),
    "gpt2": ("GPT2", dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=21, initializer_range=0.3,
                          bos_token_id=1, eos_token_id=EOS)),
    "gpt_neox": ("GPTNeoX", SMALL | dict(intermediate_size=48, max_position_embeddings=128)),
    "opt": ("OPT", SMALL | dict(ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=128, init_std=0.3)),
    "bloom": ("Bloom", dict(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.3)),
    "mistral_window": ("Mistral", LLAMA | dict(sliding_window=6)),
    "gemma2": ("Gemma2", LLAMA | dict(sliding_window=6, head_dim=16, final_logit_softcapping=5.0)),
    "lfm2": ("Lfm2", LLAMA | dict(layer_types=["conv", "full_attention"], block_ff_dim=48)),
}  # fmt: skip


def make(name, seed=3):
    kind, settings = ARCHITECTURES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def prompts(lengths, seed=0, side="left"):
    """→ input_ids, attention_mask."""
    longest = max(lengths)
    ids = torch.randint(4, VOCAB, (len(lengths), longest), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths).unsqueeze(1)).long()
    if side == "right":
        mask = mask.flip(1)
    return ids * mask, mask


def alone(model, ids, count, params=GREEDY, seed=0, ends=()):
    """One row, the whole text at every step, no cache: the definition."""
    text, found = ids.tolist(), []
    for position in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[:, -1]
        options = {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        drawn = sample_tokens(logits, **options, seed=seed, position=position)
        text.append(int(drawn.tokens))
        found.append((int(drawn.tokens), float(drawn.logprobs), float(drawn.filtered_logprobs)))
        if found[-1][0] in ends:
            break
    return found


def assert_rows(found, model, ids, mask, counts, params=GREEDY, seeds=None, ends=()):
    for row, count in enumerate(counts):
        expected = alone(model, ids[row][mask[row] == 1], count, params, seeds[row] if seeds else 0, ends)
        length = int(found.lengths[row])
        assert found.tokens[row, :length].tolist() == [token for token, _, _ in expected], row
        torch.testing.assert_close(
            found.logprobs[row, :length], torch.tensor([e[1] for e in expected]), rtol=0, atol=2e-5
        )
        torch.testing.assert_close(
            found.filtered_logprobs[row, :length], torch.tensor([e[2] for e in expected]), rtol=0, atol=2e-5
        )
        assert (found.tokens[row, length:] == 0).all() and (found.logprobs[row, length:] == 0).all()
        assert bool(found.finished[row]) == (expected[-1][0] in ends)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_are_those_of_model_generate(name):
    model = make(name)
    ids, mask = prompts([3, 9, 1, 5, 9])
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=EOS, pad_token_id=0)
    model.generation_config = GenerationConfig()
    expected = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :]
    found = generate(model, ids, mask, GREEDY, max_new_tokens=12, eos_token_ids=(EOS,))
    assert torch.equal(found.tokens, expected[:, : found.tokens.shape[1]])
    assert int(found.lengths.max()) == found.tokens.shape[1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral_window", "lfm2"])
def test_lengths_and_ends_by_row_with_few_slots(name):
    model = make(name)
    lengths, limits = [2, 11, 1, 7, 7, 3, 12, 5, 1], [1, 9, 14, 3, 7, 12, 2, 5, 10]
    ids, mask = prompts(lengths)
    seeds = [5, -3, 2**62, 7, 8, 9, 10, 11, 12]
    params = SamplingParams(temperature=1.3, top_k=20, top_p=0.9, min_p=0.01)
    found = generate(model, ids, mask, params, seeds, max_new_tokens=limits, eos_token_ids=(EOS, 9, 30), batch_size=3)
    assert_rows(found, model, ids, mask, limits, params, seeds, ends=(EOS, 9, 30))
    assert found.finished.any() and not found.finished.all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "lfm2"])
def test_rows_known_to_be_done_a_step_late(name, monkeypatch):
    """As on an accelerator: a row takes one step more, whose token is discarded."""
    model = make(name)
    limits = [1, 9, 14, 3, 7, 12, 2]
    ids, mask = prompts([2, 11, 1, 7, 7, 3, 12])
    options = dict(max_new_tokens=limits, eos_token_ids=(EOS, 9, 30), batch_size=3)
    expected = generate(model, ids, mask, SamplingParams(), range(7), **options)

    def late(device):
        flags = FinishedFlags(device)
        flags.lag = 1
        return flags

    monkeypatch.setattr(decode_module, "FinishedFlags", late)
    found = generate(model, ids, mask, SamplingParams(), range(7), **options)
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.lengths, expected.lengths)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=2e-5)


def test_columns_move_left_when_the_buffer_is_full(monkeypatch):
    moves = []
    move = decode_module.DecodeLoop._move_left
    monkeypatch.setattr(
        decode_module.DecodeLoop, "_move_left", lambda self, first: moves.append(first) or move(self, first)
    )
    model = make("llama")
    limits = [6, 3, 6, 2, 5, 6, 4, 6, 6, 1, 6, 6]
    ids, mask = prompts([4, 3, 4, 1, 4, 2, 3, 4, 1, 2, 3, 4])
    found = generate(model, ids, mask, GREEDY, max_new_tokens=limits, eos_token_ids=(), batch_size=2)
    assert_rows(found, model, ids, mask, limits)
    assert moves and all(first > 0 for first in moves)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(side):
    model = make("llama")
    ids, mask = prompts([5, 2, 7], side=side)
    found = generate(model, ids, mask.bool(), GREEDY, max_new_tokens=4, eos_token_ids=())
    assert_rows(found, model, ids, mask, [4] * 3)


def test_parameters_and_ends_by_row():
    model = make("llama")
    ids, mask = prompts([4, 4, 4, 4])
    params = [GREEDY, SamplingParams(temperature=2.0), SamplingParams(top_k=1), SamplingParams(top_p=0.5)]
    ends = [(), (1, 2, 3), (9,), ()]
    found = generate(model, ids, mask, params, range(4), max_new_tokens=6, eos_token_ids=ends)
    for row in range(4):
        single = generate(
            model, ids[row : row + 1], None, params[row], [row], max_new_tokens=6, eos_token_ids=ends[row]
        )
        assert found.tokens[row, : found.lengths[row]].tolist() == single.tokens[0].tolist()
        assert bool(found.finished[row]) == bool(single.finished)


def test_a_row_without_a_distribution_ends_and_spares_the_others():
    model = make("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("nan")
    ids, mask = prompts([6, 6, 2, 2])
    ids[ids == 60] = 59
    ids[1, 2] = 60  # in the second slot, which the next row takes over as it is
    options = dict(max_new_tokens=5, eos_token_ids=(), vocab_size=60)  # so that no other row feeds token 60 to itself
    found = generate(model, ids, mask, GREEDY, batch_size=2, **options)
    assert int(found.lengths[1]) == 1 and found.logprobs[1, 0].isnan() and not found.finished[1]
    others = torch.tensor([0, 2, 3])
    rest = generate(model, ids[others], mask[others], GREEDY, **options)
    assert torch.equal(found.tokens[others], rest.tokens) and not found.logprobs[others].isnan().any()


def test_defaults_of_the_models_generation_config():
    model = make("llama")
    ids, _ = prompts([4, 4])
    model.generation_config = GenerationConfig(eos_token_id=[EOS, 5], max_new_tokens=7, temperature=0.1, do_sample=True)
    found = generate(model, ids, None, SamplingParams(), range(2))
    expected = generate(model, ids, None, SamplingParams(), range(2), max_new_tokens=7, eos_token_ids=(EOS, 5))
    assert torch.equal(found.tokens, expected.tokens)


def test_half_precision_models_and_float64():
    ids, mask = prompts([3, 6])
    for dtype in (torch.bfloat16, torch.float64):
        model = make("llama").to(dtype)
        found = generate(model, ids, mask, GREEDY, max_new_tokens=4, eos_token_ids=())
        assert found.logprobs.dtype == torch.float32 and found.tokens.shape == (2, 4)
    exact = generate(make("llama"), ids, mask, GREEDY, max_new_tokens=4, eos_token_ids=())
    assert torch.equal(found.tokens, exact.tokens)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_ids": [[1]]}, TypeError, "input_ids: expected a tensor"),
        ({"input_ids": torch.ones(2, 3)}, TypeError, "input_ids: expected int64"),
        ({"input_ids": torch.ones(3, dtype=torch.long)}, ValueError, "input_ids"),
        ({"attention_mask": torch.ones(1, 2)}, ValueError, "attention_mask"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, ValueError, r"prompts\[1\]"),
        ({"max_new_tokens": [1, 2, 3]}, ValueError, r"max_new_tokens: expected an int or one per row \(2\), got 3"),
        ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens"),
        ({"max_new_tokens": [4, 0]}, ValueError, "max_new_tokens"),
        ({"eos_token_ids": [[1], [2], [3]]}, ValueError, "eos_token_ids"),
        ({"params": "greedy"}, TypeError, "params"),
        ({"params": [GREEDY]}, ValueError, "params"),
        ({"params": SamplingParams(), "seeds": None}, ValueError, "seeds"),
        ({"params": [SamplingParams(), GREEDY], "seeds": None}, ValueError, "seeds"),
        ({"seeds": [0.5, 1]}, TypeError, "seeds"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"vocab_size": 0}, ValueError, "vocab_size"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model"),
        ({"model": "gpt2"}, TypeError, "model"),
    ],
)
def test_bad_arguments(options, error, message):
    settings = dict(input_ids=torch.ones(2, 3, dtype=torch.long), params=GREEDY, max_new_tokens=2, eos_token_ids=())
    settings |= options
    with pytest.raises(error, match=message):
        generate(settings.pop("model", None) or tiny_model(0), settings.pop("input_ids"), **settings)
