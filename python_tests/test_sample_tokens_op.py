"""Operator and public function of `sample_tokens`: invariance, layouts, compile, opcheck, errors."""

from __future__ import annotations

import pytest
import torch

from distillm_ext import SampledTokens, sample_tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def mixed_batch(rows: int = 24, vocab: int = 3001, dtype: torch.dtype = torch.float32):
    """Rows of every kind, greedy and sampled, with parameters of their own."""
    g = torch.Generator().manual_seed(3)
    logits = (torch.randn(rows, vocab, generator=g) * 3).to(dtype)
    logits[5:6] = torch.nan

    def choice(values, dtype=torch.float32):
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (rows,), generator=g)]

    parameters = {
        "temperature": choice([0.0, 0.7, 1.0, 1.5]),
        "top_k": choice([0, 1, 50, 2000], torch.int64),
        "top_p": choice([1.0, 0.9, 0.5]),
        "min_p": choice([0.0, 0.05]),
        "seed": torch.randint(-(2**63), 2**63 - 1, (rows,), generator=g),
        "position": torch.arange(rows) * 7,
        "repetition_penalty": choice([1.0, 1.3]),
        "previous_tokens": torch.randint(-3, vocab, (rows, 9), generator=g),
        "banned": torch.rand(rows, vocab, generator=g) < 0.2,
    }
    return logits, parameters


def fields(drawn: SampledTokens) -> tuple[torch.Tensor, ...]:
    return drawn.tokens, drawn.logprobs, drawn.filtered_logprobs, drawn.valid


def assert_same(a: SampledTokens, b: SampledTokens) -> None:
    for x, y in zip(fields(a), fields(b), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(dtype):
    logits, parameters = mixed_batch(dtype=dtype)
    together = sample_tokens(logits, **parameters)
    assert together.valid.sum() == len(logits) - 1

    def part(index):
        return sample_tokens(logits[index], **{name: value[index] for name, value in parameters.items()})

    permutation = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    for index in (permutation, torch.arange(7), torch.arange(11, 24), *torch.arange(len(logits)).split(1)):
        assert_same(part(index), SampledTokens(*(x[index] for x in fields(together))))


def test_any_number_of_threads():
    logits, parameters = mixed_batch(rows=64)
    expected = sample_tokens(logits, **parameters)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            assert_same(sample_tokens(logits, **parameters), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype):
    logits, parameters = mixed_batch(dtype=dtype)
    expected = sample_tokens(logits, **parameters)
    padded = torch.full((24, 3100), torch.nan, dtype=dtype)
    padded[:, 13:3014] = logits
    every_second = torch.stack([logits, logits.roll(1, 0)], 1).reshape(48, -1)[::2]
    for view in (padded[:, 13:3014], logits.t().contiguous().t(), every_second):
        assert_same(sample_tokens(view, **parameters), expected)
    assert_same(sample_tokens(logits.clone().requires_grad_(), **parameters), expected)


def test_numbers_and_tensors_mean_the_same():
    logits, _ = mixed_batch(rows=4)
    numbers = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": -5, "position": 2**40,
               "repetition_penalty": 1.1}  # fmt: skip
    tensors = {
        name: torch.full((4,), value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
        for name, value in numbers.items()
    }
    previous = torch.tensor([[1, 2]] * 4)
    assert_same(
        sample_tokens(logits, previous_tokens=previous, **numbers),
        sample_tokens(logits, previous_tokens=previous, **tensors),
    )


def test_kept_sets_of_transformers():
    """Filters and penalty of Hugging Face's processors, where no two logits are equal."""
    process = pytest.importorskip("transformers.generation.logits_process")
    torch.manual_seed(9)
    logits, previous = torch.randn(1, 600) * 2, torch.randint(0, 600, (1, 12))
    steps = [process.RepetitionPenaltyLogitsProcessor(1.2), process.TemperatureLogitsWarper(0.9),
             process.TopKLogitsWarper(60), process.TopPLogitsWarper(0.92), process.MinPLogitsWarper(0.02)]  # fmt: skip
    scores = logits.clone()
    for step in steps:
        scores = step(previous, scores)
    log_probability = scores.log_softmax(-1)[0]
    drawn = sample_tokens(
        logits.expand(4000, -1), temperature=0.9, top_k=60, top_p=0.92, min_p=0.02, repetition_penalty=1.2,
        previous_tokens=previous.expand(4000, -1), seed=torch.arange(4000), position=0,
    )  # fmt: skip
    torch.testing.assert_close(drawn.filtered_logprobs, log_probability[drawn.tokens], rtol=1e-5, atol=1e-5)
    seen = torch.bincount(drawn.tokens, minlength=600) > 0
    likely = log_probability.exp() > 0.005
    assert seen[likely].all() and not seen[log_probability == -torch.inf].any()


def test_compile_without_graph_break():
    logits, parameters = mixed_batch(rows=6)
    compiled = torch.compile(sample_tokens, fullgraph=True, backend="eager")
    assert_same(compiled(logits, **parameters), sample_tokens(logits, **parameters))
    assert_same(compiled(logits, seed=1, position=2, top_k=5), sample_tokens(logits, seed=1, position=2, top_k=5))


def test_opcheck():
    logits, p = mixed_batch(rows=3, vocab=50)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "position")
    operator = torch.ops.distillm_ext.sample_tokens.default
    tensors = (logits, *(p[name] for name in names), p["previous_tokens"], p["banned"], None)
    torch.library.opcheck(operator, (*tensors, 1.0, 0, 1.0, 0.0, 1.0, 0, 0))
    torch.library.opcheck(operator, (logits, *[None] * 10, 0.7, 5, 0.9, 0.0, 1.0, 1, 2))


def test_operator_checks_its_arguments():
    operator = torch.ops.distillm_ext.sample_tokens
    nothing, numbers = [None] * 10, (1.0, 0, 1.0, 0.0, 1.0, 0, 0)
    for bad, message in ((torch.zeros(3), "shape"), (torch.zeros(2, 3, dtype=torch.float64), "float32, bfloat16"),
                         (torch.zeros(2, 0), "of 1 to"), (torch.zeros(1).expand(1, 2**20), "of 1 to")):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            operator(bad, *nothing, *numbers)
    with pytest.raises(RuntimeError, match=r"top_p must have shape \[2\]"):
        operator(torch.zeros(2, 3), None, None, torch.ones(3), *[None] * 7, *numbers)
    with pytest.raises(RuntimeError, match="seed must have dtype"):
        operator(torch.zeros(2, 3), *[None] * 5, torch.zeros(2, dtype=torch.int32), *[None] * 4, *numbers)


@pytest.mark.parametrize("name,value,error", [
    ("logits", [[1.0]], TypeError), ("logits", torch.zeros(2, 5, dtype=torch.float64), TypeError),
    ("logits", torch.zeros(5), ValueError), ("logits", torch.zeros(2, 0), ValueError),
    ("temperature", -0.1, ValueError), ("temperature", float("nan"), ValueError), ("temperature", "1", TypeError),
    ("temperature", float("inf"), ValueError), ("temperature", 1e-300, ValueError), ("temperature", True, TypeError),
    ("temperature", torch.ones(2, dtype=torch.int64), TypeError), ("temperature", torch.ones(3), ValueError),
    ("top_k", -1, ValueError), ("top_k", 1.5, TypeError), ("top_k", torch.ones(2), TypeError),
    ("top_p", 0.0, ValueError), ("top_p", 1.01, ValueError), ("top_p", torch.ones(2, 1), ValueError),
    ("min_p", -0.1, ValueError), ("min_p", 1.5, ValueError),
    ("seed", 2**63, ValueError), ("seed", 0.5, TypeError), ("seed", torch.zeros(2, dtype=torch.int32), TypeError),
    ("position", None, TypeError), ("position", torch.zeros(1, dtype=torch.int64), ValueError),
    ("repetition_penalty", 0.0, ValueError), ("repetition_penalty", -1.0, ValueError),
    ("previous_tokens", torch.zeros(2, dtype=torch.int64), ValueError),
    ("previous_tokens", torch.ones(2, 3), TypeError),
    ("banned", torch.zeros(2, 5), TypeError), ("banned", torch.zeros(4, dtype=torch.bool), ValueError),
    ("banned", torch.zeros(5, dtype=torch.bool, device="meta"), ValueError),
])  # fmt: skip
def test_errors_name_the_argument(name, value, error):
    arguments = {"logits": torch.zeros(2, 5), "seed": 0, "position": 0, name: value}
    with pytest.raises(error, match=f"^{name} must"):
        sample_tokens(arguments.pop("logits"), **arguments)
