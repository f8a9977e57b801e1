"""Responses from an engine as the rollouts want them: prompts and seeds in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distillm_ext.generation import Engine, SamplingParams


@dataclass(frozen=True)
class EngineResponses:
    """Answers prompts with an engine that holds the newest weights.

    Attributes:
        engine: generates.
        params: sampling parameters.
        max_new_tokens: most tokens of a response.
        eos_token_ids: tokens that end a response.
        vocab_size: only ids below it are generated: the other model may not know more.
        weights: the trained model's weights, for an engine that has a copy of its own.
    """

    engine: Engine
    params: SamplingParams
    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    vocab_size: int | None = None
    weights: Callable[[], Iterable[tuple[str, Tensor]]] = tuple

    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[int]]:
        """One response per prompt, a function of the weights, the prompt and its seed."""
        if not self.engine.shares_weights:
            self.engine.update_weights(self.weights())
        return self.engine.generate(
            prompts, self.params, max_new_tokens=self.max_new_tokens, eos_token_ids=self.eos_token_ids, seeds=seeds,
            vocab_size=self.vocab_size,
        ).token_ids  # fmt: skip


def end_token_ids(tokenizer: Any, model: Any) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's EOS and those of the model's generation config (a chat model
    ends its turns with another token than its texts)."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, (list, tuple)) else [configured]
    return tuple(sorted({token for token in (tokenizer.eos_token_id, *listed) if token is not None}))
