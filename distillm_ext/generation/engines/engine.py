"""Engines: what answers prompts with a model's weights. `LocalEngine` is the decode loop of this package."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from distillm_ext.generation.generate import Responses, generate_responses
from distillm_ext.generation.loop.forward import causal_model
from distillm_ext.generation.sampling import SamplingParams


class Engine(ABC):
    """Answers prompts. An implementation may run in this process or elsewhere.

    Attributes:
        shares_weights: the engine reads the trained model's own parameters, so `update_weights` has nothing to do.
    """

    shares_weights: bool = False

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        max_new_tokens: int | Sequence[int],
        eos_token_ids: Sequence[int],
        seeds: Sequence[int] | None = None,
        vocab_size: int | None = None,
    ) -> Responses:
        """One response per prompt, a function of weights, prompt, parameters and seed.

        Args:
            prompts: token ids, one non-empty sequence per row.
            params: temperature, top-k, top-p, min-p.
            max_new_tokens: most tokens of a response, for all or per row.
            eos_token_ids: tokens that end a response; the one that did is kept. No other token ends it.
            seeds: one int per prompt; may be None at temperature 0.
            vocab_size: only ids below it are generated; None is the model's whole vocabulary.
        """

    @abstractmethod
    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over weights.

        Args:
            weights: (name, tensor) as in the model's checkpoint, such as `full_weights` gives. May be a generator: a
                tensor need not outlive the step to the next one.
        """


class LocalEngine(Engine):
    """The decode loop (`generate`) around a model of this process.

    Args:
        model: a causal LM of transformers, or a function that returns it (wrappers come and go around a trained one).
        shares_weights: the model is the trained one itself.
        pad_token_id: fills prompts.
        batch_size: most rows in a forward pass; None is all.
        context: entered around every call, such as the run's autocast.

    Example:
        >>> engine = LocalEngine(model)
        >>> engine.generate([[5, 6]], SamplingParams(), max_new_tokens=8, eos_token_ids=(1,), seeds=(0,)).token_ids
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        *,
        shares_weights: bool = False,
        pad_token_id: int = 0,
        batch_size: int | None = None,
        context: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        self._model: Callable[[], nn.Module] = (lambda: model) if isinstance(model, nn.Module) else model
        self.shares_weights = shares_weights
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        self.context = context

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        max_new_tokens: int | Sequence[int],
        eos_token_ids: Sequence[int],
        seeds: Sequence[int] | None = None,
        vocab_size: int | None = None,
    ) -> Responses:
        """As `generate_responses`."""
        with self.context():
            return generate_responses(
                self._model(), prompts, params, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids,
                pad_token_id=self.pad_token_id, seeds=seeds, vocab_size=vocab_size, batch_size=self.batch_size,
            )  # fmt: skip

    @torch.no_grad()
    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copies weights into the model's parameters and buffers of the same names.

        Raises:
            ValueError: an unknown name, another shape, or an engine that shares the trained model's weights.
        """
        if self.shares_weights:
            raise ValueError("update_weights: this engine generates with the trained model itself")
        model = causal_model(self._model())
        known = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
        for name, tensor in weights:
            if name not in known:
                raise ValueError(f"weights: the engine's model has no parameter {name!r}")
            if known[name].shape != tensor.shape:
                raise ValueError(
                    f"weights: {name} has shape {list(tensor.shape)}, the engine's model {list(known[name].shape)}"
                )
            known[name].copy_(tensor)
