"""`generate`: prompts in, tokens out, the same whatever the batch and whatever the global random state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distillm_ext.generation import arguments
from distillm_ext.generation.loop.batching import longest_first
from distillm_ext.generation.loop.decode import DecodeLoop
from distillm_ext.generation.loop.forward import CausalForward
from distillm_ext.generation.loop.hf import HfLoop
from distillm_ext.generation.loop.progress import DrawnTokens
from distillm_ext.generation.positions import limits_within, position_limit
from distillm_ext.generation.request import Request
from distillm_ext.generation.sampling import SamplingParams


@dataclass(frozen=True, eq=False)
class GeneratedTokens:
    """What `generate` returns, in the order of the prompts, on the model's device. n is the longest response.

    Attributes:
        tokens: [rows, n] int64, the new tokens, `pad_token_id` behind the last. An end token that came is kept.
        lengths: [rows] int64, new tokens per row, at least 1.
        finished: [rows] bool, whether the row ended with one of its end tokens (False: cut off).
        logprobs: [rows, n] float32, log-probability of each token under softmax(logits): the student's own. 0 behind
            the last token.
        filtered_logprobs: [rows, n] float32, under the distribution it was drawn from (temperature, top-k, top-p,
            min-p); 0 at temperature 0.
    """

    tokens: Tensor
    lengths: Tensor
    finished: Tensor
    logprobs: Tensor
    filtered_logprobs: Tensor


@dataclass(frozen=True)
class Responses:
    """Generated token ids, one list per prompt, the prompt left out.

    Attributes:
        token_ids: per prompt, the tokens up to and including the first end token, or `max_new_tokens` of them. Never
            empty.
        finished: per prompt, whether it ended with an end token (False: truncated).
        logprobs: per prompt, the tokens' log-probabilities under softmax(logits).
    """

    token_ids: list[list[int]]
    finished: list[bool]
    logprobs: list[list[float]]


def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008
    seeds: Sequence[int] | Tensor | None = None,
    *,
    max_new_tokens: int | Sequence[int] | Tensor | None = None,
    eos_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    pad_token_id: int = 0,
    vocab_size: int | None = None,
    batch_size: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> GeneratedTokens:
    """Generates one response per prompt: evaluation mode, no gradient, with the model's cache.

    Prompts are sorted by length and prefilled in groups of like length. Rows that are done leave the batch and the
    cache, and waiting prompts take their places. Token number t of a row is drawn by `distillm_ext.sample_tokens` from
    (its logits, its parameters, its seed, t): no global generator is used, and neighbours matter only as far as the
    rounding of a matrix product depends on its shape.

    Models whose past is more than keys and values (recurrent, convolutional, chunked attention), or that cannot be told
    positions, run through transformers' own `generate` with the same draw, prompts of one length together: nothing is
    padded. Prompt and response stay within the model's positions (`max_position_embeddings`); a row that reaches them
    stops there, `finished` False.

    Works under autocast and with DDP, FSDP (1 and 2), `torch.compile` and PEFT wrappers around the model. With FSDP
    every process must call it, also one that has no prompts ([0, anything] input_ids): all run the same number of
    forward passes.

    Args:
        model: a causal language model of transformers. Its training mode is restored.
        input_ids: [rows, S] int64, padded on either side.
        attention_mask: [rows, S], 1 (or True) at tokens, 0 at padding; None where nothing is padding.
        params: sampling parameters, one for all rows or one per row.
        seeds: one int per row, taken modulo 2^64. May be None at temperature 0.
        max_new_tokens: most tokens per response, one for all rows or one per row. None is what the model's generation
            config says, else 256.
        eos_token_ids: tokens that end a response, for all rows or a sequence per row; may be empty. None is what the
            model's generation config says.
        pad_token_id: fills `tokens` behind the end.
        vocab_size: only ids below it are generated, where the model's head has more entries than there are tokens.
        batch_size: most rows in a forward pass; None is all.
        process_group: the processes that share an FSDP model; None is all.

    Returns:
        `GeneratedTokens`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape or range, or a prompt fills the model's
            positions; the message names it.

    Example:
        >>> found = generate(model, torch.tensor([[5, 6], [0, 7]]), torch.tensor([[1, 1], [0, 1]]),
        ...                  SamplingParams(temperature=0.7), seeds=(10, 11), max_new_tokens=8, eos_token_ids=(1,))
        >>> found.tokens[0, : found.lengths[0]]
    """
    arguments.check_tokens(input_ids, attention_mask)
    prompts, lengths = arguments.left_aligned_lengths(input_ids, attention_mask)
    return _generate(
        model, prompts, lengths, params, seeds, max_new_tokens, eos_token_ids, pad_token_id, vocab_size, batch_size,
        process_group,
    )  # fmt: skip


def _generate(
    model: nn.Module,
    prompts: Tensor,
    lengths: list[int],
    params: SamplingParams | Sequence[SamplingParams],
    seeds: Sequence[int] | Tensor | None,
    max_new_tokens: int | Sequence[int] | Tensor | None,
    eos_token_ids: Sequence[int] | Sequence[Sequence[int]] | None,
    pad_token_id: int,
    vocab_size: int | None,
    batch_size: int | None,
    process_group: dist.ProcessGroup | None,
) -> GeneratedTokens:
    """`generate` for prompts that end in the last column and whose lengths the host knows."""
    rows = len(lengths)
    arguments.check_rows(lengths)
    forward = CausalForward(model, process_group)
    defaults = getattr(forward.causal, "generation_config", None)
    limits = arguments.row_limits(max_new_tokens, rows, defaults)
    limits = limits_within(limits, lengths, position_limit(forward.config), "the model's positions")
    ends = arguments.row_ends(eos_token_ids, rows, defaults)
    sampling = arguments.row_sampling(params, rows)
    keys = arguments.row_seeds(seeds, rows, sampling)
    for name, value in (("batch_size", batch_size), ("vocab_size", vocab_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected an int >= 1, got {value}")
    device = forward.device
    record = DrawnTokens(rows, max(limits, default=0), device)
    with forward.ready():
        if rows:
            order = longest_first(lengths)
            index = torch.tensor(order, device=device)
            request = Request(
                prompts=prompts.to(device)[index],
                lengths=[lengths[row] for row in order],
                limits=torch.tensor(limits, device=device)[index],
                ends=ends.to(device)[index],
                seeds=keys.to(device)[index],
                sampling={n: v.to(device)[index] if isinstance(v, Tensor) else v for n, v in sampling.items()},
                vocab_size=vocab_size,
            )
            loop = DecodeLoop if forward.takes_rows else HfLoop
            loop(forward, request, batch_size or rows, record).run()
        forward.keep_step()
    return _in_order(record, order if rows else [], pad_token_id)


def _in_order(record: DrawnTokens, order: list[int], pad_token_id: int) -> GeneratedTokens:
    tokens, logprobs, filtered, lengths, finished = record.gather(pad_token_id)
    back = torch.tensor(order, dtype=torch.int64, device=record.device).argsort()
    longest = int(lengths.max()) if order else 0
    return GeneratedTokens(
        tokens[back, :longest], lengths[back], finished[back], logprobs[back, :longest], filtered[back, :longest]
    )


def generate_responses(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    max_new_tokens: int | Sequence[int],
    eos_token_ids: Sequence[int] | Sequence[Sequence[int]],
    pad_token_id: int = 0,
    seeds: Sequence[int] | None = None,
    vocab_size: int | None = None,
    batch_size: int | None = None,
) -> Responses:
    """`generate` with lists: one response per prompt.

    Args:
        model, params, max_new_tokens, eos_token_ids, seeds, vocab_size, batch_size: as in `generate`.
        prompts: token ids, one non-empty sequence per row.
        pad_token_id: any legal id; padding is marked by the attention mask, so it may equal an end token.

    Returns:
        `Responses`, in the order of `prompts`.

    Raises:
        TypeError, ValueError: as in `generate`.

    Example:
        >>> generate_responses(model, [[5, 6], [7]], SamplingParams(), max_new_tokens=8, eos_token_ids=(1,),
        ...                    seeds=(10, 11)).token_ids
    """
    lengths = [len(prompt) for prompt in prompts]
    arguments.check_rows(lengths)
    found = _generate(
        model, left_padded(prompts, pad_token_id), lengths, params, seeds, max_new_tokens, eos_token_ids, pad_token_id,
        vocab_size, batch_size, None,
    )  # fmt: skip
    return to_lists(found)


def left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int) -> Tensor:
    """[rows, longest prompt] int64; every prompt ends in the last column."""
    longest = max((len(prompt) for prompt in prompts), default=0)
    ids = np.full((len(prompts), longest), pad_token_id, dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
    return torch.from_numpy(ids)


def to_lists(found: GeneratedTokens) -> Responses:
    """The responses as lists, without what is behind each row's end."""
    host: dict[str, Any] = {field.name: getattr(found, field.name).tolist() for field in fields(found)}
    pairs = list(zip(host["tokens"], host["logprobs"], host["lengths"], strict=True))
    return Responses(
        [tokens[:length] for tokens, _, length in pairs],
        host["finished"],
        [values[:length] for _, values, length in pairs],
    )
