"""`generate_responses`: prompts in, responses out, with the same result whatever the global random state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from distillm_ext.generation.sampling import SamplingParams, filter_logits, sample_inverse_cdf

# Separates these draws from other Philox streams that may be keyed with the same seeds.
_STREAM = 0x5A17


@dataclass(frozen=True)
class Responses:
    """Generated token ids, one list per prompt, the prompt left out.

    Attributes:
        token_ids: per prompt, the tokens up to and including the first end-of-sequence token, or `max_new_tokens`
            of them. Never empty.
        finished: per prompt, whether it ended with an end-of-sequence token (False: truncated).
    """

    token_ids: list[list[int]]
    finished: list[bool]


class _PhiloxSampler(LogitsProcessor):
    """Samples inside the logits processor and leaves a one-hot row, so that greedy search picks the sampled token.

    `generate(do_sample=True)` draws from the global generator for the whole batch at once: a row's tokens would depend
    on its neighbours and on everything drawn before. Here each row has its own counter-based stream.
    """

    def __init__(self, params: SamplingParams, uniforms: Tensor, prompt_length: int) -> None:
        self.params = params
        self.uniforms = uniforms
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_length
        tokens = sample_inverse_cdf(filter_logits(scores, self.params), self.uniforms[:, position])
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens.unsqueeze(1), 0.0)


class _VocabularyCut(LogitsProcessor):
    """Excludes the ids from `vocab_size` on."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        beyond = torch.arange(scores.shape[-1], device=scores.device) >= self.vocab_size
        return scores.masked_fill(beyond, float("-inf"))


@contextlib.contextmanager
def _generating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and a neutral generation config: a checkpoint's own defaults (a repetition penalty, say) would
    otherwise be merged into ours and change the distribution that is sampled."""
    was_training, generation_config = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = generation_config
        model.train(was_training)


def _left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """→ input_ids, attention_mask, both [rows, longest prompt], int64; every prompt ends in the last column."""
    longest = max(len(prompt) for prompt in prompts)
    input_ids = np.full((len(prompts), longest), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros((len(prompts), longest), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = prompt
        attention_mask[row, longest - len(prompt) :] = 1
    return torch.from_numpy(input_ids).to(device), torch.from_numpy(attention_mask).to(device)


def _uniforms(seeds: Sequence[int], max_new_tokens: int) -> np.ndarray:
    """[rows, max_new_tokens] draws in [0, 1); a row depends on its own seed alone."""
    keys = [np.array([seed & ((1 << 64) - 1), _STREAM], dtype=np.uint64) for seed in seeds]
    rows = [np.random.Generator(np.random.Philox(key=key)).random(max_new_tokens) for key in keys]
    return np.stack(rows)


def _check(prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None, params: SamplingParams, limit: int) -> None:
    if limit < 1:
        raise ValueError(f"max_new_tokens: expected an int >= 1, got {limit}")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts[{row}]: expected at least one token, got none; begin it with a BOS token")
    if params.temperature > 0 and seeds is None:
        raise ValueError("seeds: sampling at temperature > 0 needs one seed per prompt, got None")
    if seeds is not None and len(seeds) != len(prompts):
        raise ValueError(f"seeds: expected one per prompt ({len(prompts)}), got {len(seeds)}")


def _trim(rows: list[list[int]], eos_token_ids: Sequence[int]) -> Responses:
    """Cuts each row after its first end-of-sequence token. The padding that follows is recognised by its place, never
    by its id: pad and end-of-sequence are the same token in many tokenizers."""
    ends = set(eos_token_ids)
    token_ids, finished = [], []
    for row in rows:
        end = next((index for index, token in enumerate(row) if token in ends), None)
        token_ids.append(row if end is None else row[: end + 1])
        finished.append(end is not None)
    return Responses(token_ids, finished)


def _generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    config: GenerationConfig,
    draws: np.ndarray | None,
    vocab_size: int | None,
) -> Responses:
    device = next(model.parameters()).device
    input_ids, attention_mask = _left_padded(prompts, config.pad_token_id, device)
    processors = LogitsProcessorList([] if vocab_size is None else [_VocabularyCut(vocab_size)])
    if draws is not None:
        processors.append(_PhiloxSampler(params, torch.from_numpy(draws).to(device), input_ids.shape[1]))
    output = model.generate(
        input_ids=input_ids, attention_mask=attention_mask, generation_config=config, logits_processor=processors
    )
    return _trim(output[:, input_ids.shape[1] :].tolist(), config.eos_token_id or ())


@torch.no_grad()
def generate_responses(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int = 0,
    seeds: Sequence[int] | None = None,
    vocab_size: int | None = None,
    batch_size: int | None = None,
) -> Responses:
    """Generates one response per prompt: evaluation mode, no gradient, left padding, KV cache on.

    Args:
        model: an unwrapped causal language model; its training mode and generation config are restored afterwards.
        prompts: token ids, one non-empty sequence per row.
        params: temperature, top-k, top-p.
        max_new_tokens: most tokens per response.
        eos_token_ids: tokens that end a response; the one that did is kept. May be empty.
        pad_token_id: any legal id; padding is marked by the attention mask, so it may equal an end token.
        seeds: one int per prompt. A row's random draws depend on its seed alone, not on its neighbours or on any global
            generator. May be None at temperature 0.
        vocab_size: only ids below it are generated, where the model's head has more entries than there are tokens.
        batch_size: prompts per forward pass; None is all of them.

    Returns:
        `Responses`, in the order of `prompts`.

    Raises:
        ValueError: an empty prompt, a missing or wrong number of seeds, max_new_tokens < 1.

    Example:
        >>> generate_responses(model, [[5, 6], [7]], SamplingParams(), max_new_tokens=8, eos_token_ids=(1,),
        ...                    seeds=(10, 11)).token_ids
    """
    _check(prompts, seeds, params, max_new_tokens)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=pad_token_id,
    )
    parts: list[Responses] = []
    step = batch_size or max(len(prompts), 1)
    with _generating(model):
        for start in range(0, len(prompts), step):
            chunk = slice(start, start + step)
            draws = None if seeds is None or params.temperature == 0 else _uniforms(seeds[chunk], max_new_tokens)
            parts.append(_generate_batch(model, prompts[chunk], params, config, draws, vocab_size))
    token_ids = [ids for part in parts for ids in part.token_ids]
    return Responses(token_ids, [end for part in parts for end in part.finished])
