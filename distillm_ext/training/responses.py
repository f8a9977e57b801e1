"""Responses from a model as the rollouts want them: prompts and seeds in, token ids out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from distillm_ext.generation import SamplingParams, generate_responses


@dataclass(frozen=True)
class ModelResponses:
    """Answers prompts with `generate_responses`.

    Attributes:
        model: returns the unwrapped model at the time of the call (wrappers come and go around it).
        params: sampling parameters.
        max_new_tokens: most tokens of a response.
        eos_token_ids: tokens that end a response.
        pad_token_id: fills the prompts.
        vocab_size: only ids below it are generated: the other model may not know more.
        batch_size: prompts per pass, or None for all at once.
        autocast: context of the run's mixed precision.
    """

    model: Callable[[], Any]
    params: SamplingParams
    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    vocab_size: int | None = None
    batch_size: int | None = None
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[int]]:
        """One response per prompt, a function of the weights, the prompt and its seed."""
        with self.autocast():
            return generate_responses(
                self.model(),
                prompts,
                self.params,
                max_new_tokens=self.max_new_tokens,
                eos_token_ids=self.eos_token_ids,
                pad_token_id=self.pad_token_id,
                seeds=seeds,
                vocab_size=self.vocab_size,
                batch_size=self.batch_size,
            ).token_ids


def end_token_ids(tokenizer: Any, model: Any) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's EOS and those of the model's generation config (a chat model
    ends its turns with another token than its texts)."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, (list, tuple)) else [configured]
    return tuple(sorted({token for token in (tokenizer.eos_token_id, *listed) if token is not None}))
