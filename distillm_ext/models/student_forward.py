"""The student's forward pass inside whatever wraps it (DDP, FSDP2, mixed precision), with the loss at the head.

Calling the unwrapped model under DDP leaves gradients unsynchronised, and using the head's weight outside the wrapper
breaks untied heads and FSDP2. So the wrapper is called as usual, its innermost forward is replaced for the duration of
the call, and the loss is computed inside the head's own forward, where the wrapper has made the head's weight whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distillm_ext.containers import LinearHead
from distillm_ext.models.logit_reader import LogitReader, TokenBatch, replaced_forward
from distillm_ext.models.router_loss import ModelLoss, OwnLoss

# From what the head gives for each batch, in the order given, to the loss (or any tensor): logits [R_i, V], or in a
# fused call hidden states [R_i, H] and the head (`StudentOutput`).
Consumer = Callable[[list[Any]], Tensor]


class StudentForward:
    """Runs batches through the wrapped student and hands their logits to a consumer inside the head.

    Args:
        model: the student without wrappers.
        autocast: returns the context of the run's mixed precision (`accelerator.autocast`). The replaced forward
            bypasses the one that Accelerate put around the model's own.
    """

    def __init__(self, model: nn.Module, autocast: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self.model = model
        self.reader = LogitReader(model)
        self.own = OwnLoss(self.reader)
        self.autocast = autocast

    def verify(self, token_ids: Sequence[int]) -> None:
        """Checks on a few tokens that backbone and head, used apart, give the model's own logits, and finds out what
        the model adds to its loss by itself."""
        # A model that is still to be materialised cannot run yet; its split is trusted.
        if any(parameter.is_meta for parameter in self.model.parameters()):
            self.own.trust_configuration()
            return
        self.reader.verify(token_ids, "student")
        self.own.probe(token_ids, "student")

    def __call__(
        self,
        wrapped: nn.Module,
        batches: Sequence[TokenBatch],
        consume: Consumer,
        *,
        fused: bool = False,
        model_losses: list[ModelLoss] | None = None,
    ) -> Tensor:
        """Returns what `consume` makes of the head's output.

        Args:
            wrapped: the student as it is called in training (DDP, FSDP2, or the model itself).
            batches: one or more batches; all go through the head in one product.
            consume: called once, with one [R_i, V] tensor per batch.
            fused: hand over a `LinearHead` per batch instead of logits, where the head allows (`LogitReader.fuses`):
                `consume` runs inside the head's forward, where its weight is whole.
            model_losses: where the model adds to its loss by itself (`OwnLoss.active`), gets what it adds for each
                batch before `consume` is called. None: nothing of it is computed.
        """
        model = self.model
        run = self._through_head if self.reader.apart() else self._through_model
        if fused and self.reader.fuses():
            run = self._through_loss
        with contextlib.ExitStack() as stack:
            before: list[Callable[..., Any]] = []

            def forward(*args: Any, **kwargs: Any) -> Tensor:
                with self.autocast():
                    return run(batches, consume, _Passes(self, before[0], model_losses))

            before.append(stack.enter_context(replaced_forward(model, forward)))
            return wrapped(input_ids=batches[0].input_ids)

    def _through_head(self, batches: Sequence[TokenBatch], consume: Consumer, passes: _Passes) -> Tensor:
        rows = [passes.hidden(batch) for batch in batches]
        sizes = [len(row) for row in rows]
        head = self.reader.head

        def head_forward(hidden: Tensor) -> Tensor:
            logits = self.reader.transform(project(hidden))
            return consume(list(logits.split(sizes)))

        with replaced_forward(head, head_forward) as project:
            return head(torch.cat(rows) if len(rows) > 1 else rows[0])

    def _through_loss(self, batches: Sequence[TokenBatch], consume: Consumer, passes: _Passes) -> Tensor:
        rows = [passes.hidden(batch) for batch in batches]
        sizes = [len(row) for row in rows]
        head, transform = self.reader.head, self.reader.transform

        def head_forward(hidden: Tensor) -> Tensor:
            if isinstance(head.weight, DTensor):
                # Tensor parallelism: no process has the whole vocabulary, the module knows how to project.
                return consume(list(transform(project(hidden)).split(sizes)))
            parts = hidden.split(sizes)
            return consume([LinearHead(h, head.weight, head.bias, transform.softcap, transform.scale) for h in parts])

        with replaced_forward(head, head_forward) as project:
            return head(torch.cat(rows) if len(rows) > 1 else rows[0])

    def _through_model(self, batches: Sequence[TokenBatch], consume: Consumer, passes: _Passes) -> Tensor:
        return consume([passes.logits(batch) for batch in batches])


class _Passes:
    """The forward passes of one call; where wanted, each adds what the model adds to its loss to `losses`."""

    def __init__(self, student: StudentForward, forward: Callable[..., Any], losses: list[ModelLoss] | None) -> None:
        self.reader = student.reader
        self.own = student.own if student.own.active else None
        self.forward = forward
        self.losses = losses

    def hidden(self, batch: TokenBatch) -> Tensor:
        if self.own is None or self.losses is None:
            return self.reader.hidden(batch)
        hidden, loss = self.own.hidden(batch, self.forward)
        self.losses.append(loss)
        return hidden

    def logits(self, batch: TokenBatch) -> Tensor:
        if self.own is None or self.losses is None:
            return self.reader.full(batch, self.forward)
        logits, loss = self.own.logits(batch, self.forward)
        self.losses.append(loss)
        return logits
