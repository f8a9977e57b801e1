"""Responses from an engine as the rollouts want them: prompts and seeds in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from distillm_ext.generation import Engine, SamplingParams
from distillm_ext.generation.positions import limits_within


@dataclass(frozen=True)
class EngineResponses:
    """Answers prompts with an engine that holds the newest weights.

    Attributes:
        engine: generates.
        params: sampling parameters.
        max_new_tokens: most tokens of a response.
        max_length: most tokens of prompt and response.
        eos_token_ids: tokens that end a response.
        vocab_size: only ids below it are generated: the other model may not know more.
        weights: the trained model's weights, for an engine that has a copy of its own.
    """

    engine: Engine
    params: SamplingParams
    max_new_tokens: int
    max_length: int
    eos_token_ids: tuple[int, ...]
    vocab_size: int | None = None
    weights: Callable[[], Iterable[tuple[str, Tensor]]] = tuple

    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[int]]:
        """One response per prompt, a function of the weights, the prompt and its seed.

        Raises:
            ValueError: a prompt that fills `max_length`; the message names it.
        """
        if not self.engine.shares_weights:
            self.engine.update_weights(self.weights())
        lengths = [len(prompt) for prompt in prompts]
        limits = limits_within([self.max_new_tokens] * len(prompts), lengths, self.max_length, "max_length")
        return self.engine.generate(
            prompts, self.params, max_new_tokens=limits, eos_token_ids=self.eos_token_ids, seeds=seeds,
            vocab_size=self.vocab_size,
        ).token_ids  # fmt: skip
