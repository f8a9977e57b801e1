"""The decode loop against transformers' `model.generate`: SmolLM2-135M on the CPU, 8 rows, up to 64 new tokens.

    python benchmarks/bench_generation.py [--threads 2] [--rounds 2] [--rows 8] [--new-tokens 64]

Both sides make as many tokens for the same rows with the same settings: greedy, each row up to a length of its own (as
if its end token came there), and sampled likewise, with top-k 50 and top-p 0.9 at temperature 0.8 or, by --samplings,
without filters. `model.generate` gets the lengths as a stopping criterion per row, as an end token would stop it; it
goes on with padding until the longest row is done. Prompts and responses have the spread named in the table; tokens per
second count the tokens that a row keeps. Candidates take turns in one process, after a short run of each to warm up;
medians. Greedy tokens are compared. 4 to 6 minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import torch
from device import clock
from harness import environment, publish
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig, StoppingCriteria, StoppingCriteriaList

from distillm_ext.demo.assets import TEACHER, fetch
from distillm_ext.generation import SamplingParams, generate

# Prompt lengths and response lengths as shares of --prompt and --new-tokens, for eight rows.
SPREADS = {
    "none": ([1.0] * 8, [1.0] * 8),
    "mixed": ([0.4, 1.0, 0.6, 0.8, 0.5, 0.9, 0.7, 0.3], [0.5, 0.7, 1.0, 0.3, 0.8, 0.4, 0.6, 0.9]),
    "wide": ([1.0, 0.1, 0.2, 0.1, 0.3, 0.1, 0.2, 0.1], [0.1, 0.2, 1.0, 0.1, 0.4, 0.1, 0.2, 0.3]),
}
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "top-k 50, top-p 0.9": SamplingParams(temperature=0.8, top_k=50, top_p=0.9),
    "plain sampling": SamplingParams(),
}


class RowLengths(StoppingCriteria):
    """Stops each row at a length of its own."""

    def __init__(self, limits: Tensor, prompt: int) -> None:
        self.limits, self.prompt = limits, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return self.limits <= input_ids.shape[1] - self.prompt


def batch(spread: str, rows: int, prompt: int, new_tokens: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """→ left-padded ids, mask, response lengths."""
    shares, ends = SPREADS[spread]
    lengths = [max(1, round(shares[row % 8] * prompt)) for row in range(rows)]
    limits = torch.tensor([max(1, round(ends[row % 8] * new_tokens)) for row in range(rows)])
    longest = max(lengths)
    draws = torch.randint(100, vocab - 100, (rows, longest), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths).unsqueeze(1)).long()
    return draws * mask, mask, limits


def baseline(model: Any, ids: Tensor, mask: Tensor, limits: Tensor, params: SamplingParams) -> Tensor:
    sampled = params.temperature > 0
    config = GenerationConfig(
        max_new_tokens=int(limits.max()), do_sample=sampled, eos_token_id=None, pad_token_id=0,
        **(dict(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p) if sampled else {}),
    )  # fmt: skip
    stops = StoppingCriteriaList([RowLengths(limits, ids.shape[1])])
    with torch.no_grad():
        return model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=stops
        )[:, ids.shape[1] :]  # fmt: skip


def ours(model: Any, ids: Tensor, mask: Tensor, limits: Tensor, params: SamplingParams) -> Tensor:
    found = generate(model, ids, mask, params, range(len(ids)), max_new_tokens=limits, eos_token_ids=())
    return found.tokens


def same_tokens(left: Tensor, right: Tensor, limits: Tensor) -> float:
    """Share of the kept tokens on which both agree."""
    kept = torch.arange(left.shape[1]) < limits.unsqueeze(1)
    return float((left == right)[kept].float().mean())


def measure(model: Any, spread: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    ids, mask, limits = batch(spread, options.rows, options.prompt, options.new_tokens, model.config.vocab_size)
    candidates = {"ours": ours, "generate": baseline}
    for candidate in candidates.values():
        candidate(model, ids, mask, limits.clamp(max=2), SAMPLINGS[name])
    made: dict[str, Tensor] = {}
    samples: dict[str, list[float]] = {key: [] for key in candidates}
    for _ in range(options.rounds):
        for key, candidate in candidates.items():
            run = partial(candidate, model, ids, mask, limits, SAMPLINGS[name])
            samples[key].append(clock.seconds(lambda key=key, run=run: made.update({key: run()}), "cpu"))
    seconds = {key: statistics.median(values) for key, values in samples.items()}
    tokens = int(limits.sum())
    row = {
        "spread": spread,
        "sampling": name,
        "tokens": tokens,
        "ours tokens/s": tokens / seconds["ours"],
        "generate tokens/s": tokens / seconds["generate"],
        "ratio": seconds["generate"] / seconds["ours"],
    }
    if SAMPLINGS[name].temperature == 0:
        row["same tokens"] = same_tokens(made["ours"], made["generate"], limits)
    return row | environment()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="longest prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--spreads", nargs="+", default=list(SPREADS), choices=list(SPREADS))
    parser.add_argument("--samplings", nargs="+", default=list(SAMPLINGS)[:2], choices=list(SAMPLINGS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = fetch(TEACHER)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.generation_config = GenerationConfig()  # the checkpoint's own end tokens and penalties stay out on both sides
    rows = [measure(model, spread, name, options) for spread in options.spreads for name in options.samplings]
    publish("Generation, SmolLM2-135M", rows, "generation_cpu.csv")


if __name__ == "__main__":
    main()
