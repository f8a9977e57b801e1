"""The loss that a model adds to the cross-entropy by itself: the balance of a router's experts, above all.

Models with routed experts end their forward pass with `loss = loss_function(logits, labels)`, then `loss += coefficient
· balance`. Here that forward pass runs with a loss function that gives 0 and a head that computes nothing: what is left
of its loss is exactly what it adds, with its own formula, masks, layers and coefficient, whichever model it is. Whether
that reproduces what the untouched model adds is checked on a few tokens at start; where it does not (a penalty on the
logits, say), one warning names the term that is left out.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from distillm_ext.data.draws import preserved_rng
from distillm_ext.models.logit_reader import LogitReader, TokenBatch, replaced_forward

logger = logging.getLogger(__name__)
_COEFFICIENT = re.compile(r"(aux|router|balance|z|mtp|moe).*(loss|coef)|loss.*(coef|weight)")


@dataclass(frozen=True)
class ModelLoss:
    """What a model adds to its loss for one batch.

    Attributes:
        name: "router" where the model reports a balance of its experts (`aux_loss`), else "model".
        term: scalar, weighted as the model weighs it; differentiable.
        value: scalar to log: the balance without its coefficient, or the term where the model reports no balance.
    """

    name: str
    term: Tensor
    value: Tensor


class OwnLoss:
    """Runs a causal LM for its hidden states or logits and what it adds to its loss.

    Args:
        reader: of the model.

    Attributes:
        active: whether the model adds something that is reproduced here. `probe` sets it.
    """

    def __init__(self, reader: LogitReader) -> None:
        self.reader = reader
        model: Any = reader.model
        self.causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.active = False

    def hidden(self, batch: TokenBatch, forward: Callable[..., Any]) -> tuple[Tensor, ModelLoss]:
        """→ ([R, H] hidden states before the head, what the model adds).

        Args:
            batch: tokens and positions.
            forward: the model's own forward pass, where that of the model is replaced.
        """
        states: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            states.append(output.last_hidden_state)

        def no_logits(hidden: Tensor) -> Tensor:
            return hidden.new_zeros(*hidden.shape[:-1], 1)

        run = forward if self.causal is self.reader.model else self.causal.forward
        with contextlib.ExitStack() as stack:
            stack.callback(self.reader.backbone.register_forward_hook(keep).remove)
            stack.enter_context(replaced_forward(self.reader.head, no_logits))
            output = self._output(batch, run)
        return batch.select(states[0]), _model_loss(output)

    def logits(self, batch: TokenBatch, forward: Callable[..., Any]) -> tuple[Tensor, ModelLoss]:
        """→ ([R, V] logits of the model's whole forward pass, what the model adds)."""
        output = self._output(batch, forward)
        return batch.select(output.logits), _model_loss(output)

    def _output(self, batch: TokenBatch, run: Callable[..., Any]) -> Any:
        def zero(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return torch.zeros((), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)

        with _loss_function(self.causal, zero):
            return _own_pass(run, batch)

    @torch.no_grad()
    def probe(self, token_ids: Sequence[int], name: str) -> None:
        """Finds out on a few tokens whether the model adds something to its loss, and whether it is reproduced here.

        Args:
            token_ids: a legal input of a few tokens.
            name: what to call the model in the warning.

        Example:
            >>> own = OwnLoss(LogitReader(model))  # doctest: +SKIP
            >>> own.probe([5, 6, 7], "student")  # doctest: +SKIP
            >>> own.active  # doctest: +SKIP
            True
        """
        causal = self.causal
        if not self._takes_labels() or len(token_ids) < 2:
            return
        device = next(causal.parameters()).device
        ids = torch.tensor([list(token_ids)], device=device)
        batch = TokenBatch(ids, torch.ones_like(ids), torch.arange(ids.shape[1], device=device))
        modes = {module: module.training for module in causal.modules()}
        causal.train()  # some models add to their loss in training alone
        try:
            with preserved_rng(device):
                added, scale = self._added(batch)
                if math.isfinite(added) and abs(added) <= 1e-6 * scale:
                    return
                found = self._reproduced(batch)
        except Exception as error:  # whatever its authors' code raises: a distillation loss can do without it
            logger.warning(
                "%s: %s cannot compute its own training loss on a few tokens (%s: %s); what it may add to a loss by "
                "itself is left out", name, type(causal).__name__, type(error).__name__, error,
            )  # fmt: skip
            return
        finally:
            for module, mode in modes.items():
                module.training = mode
        # A term of NaN or inf cannot be compared with anything.
        self.active = (
            math.isfinite(added) and found is not None and abs(found - added) <= 1e-3 * abs(added) + 1e-6 * scale
        )
        if not self.active:
            _warn(name, causal, added)

    def trust_configuration(self) -> None:
        """In place of `probe`, for a model whose weights are not there yet."""
        config = self.causal.config.get_text_config(decoder=True)
        self.active = bool(getattr(config, "output_router_logits", False)) and self._takes_labels()

    def _takes_labels(self) -> bool:
        named = inspect.signature(self.causal.forward).parameters
        return "labels" in named and hasattr(self.causal, "loss_function")

    def _added(self, batch: TokenBatch) -> tuple[float, float]:
        """→ (what the untouched model adds to the cross-entropy, the size of rounding's yardstick)."""
        plain, losses = self.causal.loss_function, []

        def recorded(*args: Any, **kwargs: Any) -> Tensor:
            loss = plain(*args, **kwargs)
            losses.append(loss.detach().clone())  # the model may add in place
            return loss

        torch.manual_seed(0)
        with _loss_function(self.causal, recorded):
            output = _own_pass(self.causal.forward, batch)
        if output.loss is None:
            return 0.0, 1.0
        whole = float(output.loss)
        if losses:
            return whole - float(losses[0]), abs(whole)
        logits, labels = output.logits[:, :-1].flatten(0, 1).float(), batch.input_ids[:, 1:].flatten()
        return whole - float(functional.cross_entropy(logits, labels)), 1e3 * abs(whole)

    def _reproduced(self, batch: TokenBatch) -> float | None:
        torch.manual_seed(0)
        run = self.hidden if self.reader.apart() else self.logits
        try:
            return float(run(batch, self.causal.forward)[1].term)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            return None  # a forward pass that does more with its logits than hand them to the loss: the caller warns


def mean_term(losses: Sequence[ModelLoss], passes: int, num_processes: int) -> ModelLoss:
    """The share of one micro-batch: summed over an optimizer step's micro-batches and processes, the mean over all of
    its forward passes.

    The balance of experts is no sum over tokens: each forward pass has its own, and a step takes their mean, so that
    the coefficient means the same however the step is split.

    Args:
        losses: one per forward pass of this micro-batch.
        passes: micro-batches of the step on this process.
        num_processes: processes.
    """
    share = 1.0 / (len(losses) * passes * num_processes)
    term = torch.stack([loss.term for loss in losses]).sum() * share
    value = torch.stack([loss.value.to(term) for loss in losses]).sum() * share
    return ModelLoss(losses[0].name, term, value)


def _own_pass(run: Callable[..., Any], batch: TokenBatch) -> Any:
    return run(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.input_ids,
        use_cache=False,
        return_dict=True,
    )


def _model_loss(output: Any) -> ModelLoss:
    balance = getattr(output, "aux_loss", None)
    if isinstance(balance, Tensor):
        return ModelLoss("router", output.loss, balance.detach())
    return ModelLoss("model", output.loss, output.loss.detach())


@contextlib.contextmanager
def _loss_function(causal: Any, function: Callable[..., Tensor]) -> Iterator[None]:
    """Replaces what the model computes its loss with; transformers' property keeps it in an attribute of its own."""
    is_property = isinstance(getattr(type(causal), "loss_function", None), property)
    name = "_loss_function" if is_property else "loss_function"
    before = causal.__dict__.get(name)
    causal.loss_function = function
    try:
        yield
    finally:
        del causal.__dict__[name]
        if before is not None:
            causal.__dict__[name] = before


def _warn(name: str, causal: Any, added: float) -> None:
    config = causal.config.get_text_config(decoder=True)
    settings = {key: value for key, value in config.to_dict().items() if _COEFFICIENT.search(key) and value}
    listed = ", ".join(f"{key}={value}" for key, value in settings.items()) or "none of a known name"
    logger.warning(
        "%s: %s adds a term of its own to its training loss (%.4g on a few tokens; settings of its configuration that "
        "may make it: %s), which cannot be computed beside a distillation loss and is left out",
        name, type(causal).__name__, added, listed,
    )  # fmt: skip
