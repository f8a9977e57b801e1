"""What happens when a loss or a gradient is NaN or inf: the optimizer step is not taken, on any process.

Each micro-batch leaves a flag on the device, each optimizer step one per gradient, and all processes add theirs. How
the flags keep the step from being taken depends on what can be had without waiting for the device:

* fused Adam, AdamW and Adagrad of torch on CUDA (the default optimizer there is one) take the flag as `found_inf`:
  their kernels leave weights, moments and step counters as they are. The host reads the flag one step late, before the
  next optimizer step; by then the device has long passed it. What the host did meanwhile, advancing the learning rate,
  is undone then.
* any other optimizer, and float16 with its gradient scaler, is asked for nothing: the host reads the flag before the
  step (on CUDA this waits for the backward pass, once per optimizer step).

Overflows that float16's scaler meets while it searches its scale are no faults. They count as one when the scale is
down to 1, where nothing is left to scale.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from distillm_ext.training.faults.nonfinite import nonfinite_gradients

logger = logging.getLogger(__name__)
NAN_POLICIES = ("stop", "skip")
# SGD's fused kernel leaves its momentum buffer unwritten when its first step is one that is not taken.
_TAKE_FOUND_INF = (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)


@dataclass
class StepRecord:
    """One optimizer step, kept until it is known whether it was sound.

    Attributes:
        step: its number, as in the log: 1 is the first.
        source: of its batches ("data", "fresh", "replay", …).
        batches: its micro-batches.
        losses: [] bool per micro-batch, on the device: whether its loss is NaN or inf.
        names, gradients: parameters with a gradient, and [names] bool: whether it holds NaN or inf.
        norm: [] bool: whether the norm of all gradients is NaN or inf. Where each of them is finite it has overflown,
            and clipping has divided by it: every gradient is 0.
    """

    step: int
    source: str
    batches: Sequence[Mapping[str, Any]]
    losses: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    gradients: Tensor | None = None
    norm: Tensor | None = None

    def flags(self, device: torch.device) -> Tensor:
        """[3] float32: 1 where a loss, a gradient of this process, the norm of all gradients is not finite."""
        flags = torch.zeros(3, dtype=torch.float32, device=device)
        if self.losses:
            flags[0] = torch.stack(self.losses).any()
        if self.gradients is not None:
            flags[1] = self.gradients.any()
        if self.norm is not None:
            flags[2] = self.norm
        return flags


@dataclass(frozen=True)
class Fault:
    """A step that was not taken.

    Attributes:
        record: the step.
        affected: whether this process has the loss or, where every loss is finite, the gradient that is not. Where all
            are finite and only the norm of all gradients is not, every process has it.
    """

    record: StepRecord
    affected: bool


class NanGuard(TrainerCallback):
    """Keeps optimizer steps of NaN or inf from being taken.

    Args:
        accelerator: of the run.
        report: called on every process for each fault, with its step as it was; under "stop" it raises.
        drop_losses: called once per optimizer step with a scalar that is > 0 on the device where the step is not taken.

    Attributes:
        skipped: steps of the run that were not taken, by the end of the last `settle`.
    """

    def __init__(
        self, accelerator: Any, *, report: Callable[[Fault], None], drop_losses: Callable[[Tensor], None]
    ) -> None:
        self.accelerator = accelerator
        self.report = report
        self.drop_losses = drop_losses
        self.optimizer: Any = None
        self.reset()

    def reset(self) -> None:
        """Forgets an earlier run."""
        self.skipped = 0
        self._record: StepRecord | None = None
        self._unread: tuple[StepRecord, LateValues, Callable[[], None]] | None = None

    # ---- what a step tells

    def begin_step(self, record: StepRecord) -> None:
        """Announces the micro-batches of the next optimizer step."""
        self._record = record

    @torch.no_grad()
    def add_micro_batch(self, loss: Tensor, model: torch.nn.Module) -> Tensor:
        """Notes the loss of a micro-batch after its backward pass, and with the last one the gradients.

        Returns:
            The loss, or 0 where it is NaN or inf: transformers adds it to a sum that would never be finite again.
        """
        finite = torch.isfinite(loss)
        if self._record is not None:
            self._record.losses.append(~finite)
            if self.accelerator.sync_gradients and self._gradients_count():
                self._record.names, self._record.gradients = nonfinite_gradients(model, loss.device)
        return torch.where(finite, loss, torch.zeros_like(loss))

    def add_grad_norm(self, norm: Any) -> None:
        """Notes the norm of all gradients that clipping has found, a tensor or a number. The host does not wait."""
        if self._record is not None and norm is not None and self._gradients_count():
            local = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            self._record.norm = ~torch.isfinite(torch.as_tensor(local, device=self.accelerator.device))

    def _gradients_count(self) -> bool:
        scaler = self.accelerator.scaler
        return scaler is None or scaler.get_scale() <= 1.0

    # ---- the optimizer step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._release()  # of a run that an error ended
        self.optimizer, self.scheduler = kwargs["optimizer"], kwargs["lr_scheduler"]
        self._own_step = self.optimizer.__dict__.get("step")
        self._take_step = self.optimizer.step

        # The attributes that torch's schedulers have put on the method stay.
        @functools.wraps(self._take_step)
        def step(closure: Any = None) -> None:
            self._step(closure)

        self.optimizer.step = step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.settle()
        self._release()

    def _release(self) -> None:
        if self.optimizer is None:
            return
        if self._own_step is None:
            del self.optimizer.step
        else:
            self.optimizer.step = self._own_step
        self.optimizer = None

    def _step(self, closure: Any = None) -> None:
        self.settle()
        record, self._record = self._record, None
        options = {} if closure is None else {"closure": closure}
        if record is None:
            return self._take_step(**options)
        mine = record.flags(self.accelerator.device)
        everyone = self.accelerator.reduce(mine, reduction="sum") if self.accelerator.num_processes > 1 else mine
        self.drop_losses(everyone.sum())
        values = LateValues(torch.cat([mine, everyone]))
        if self._on_device():
            return self._step_on_device(record, values, everyone)
        if self._is_fault(values):
            self._leave_out()
            return self._fault(record, values)
        if self.accelerator.scaler is None:
            self.optimizer._is_overflow = False
        return self._take_step(**options)

    def _on_device(self) -> bool:
        """Whether the optimizer can be told on the device, see the head of this file."""
        optimizer = self.optimizer.optimizer
        return (
            self.accelerator.device.type == "cuda"
            and self.accelerator.scaler is None
            and type(optimizer) in _TAKE_FOUND_INF
            and bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        )

    def _step_on_device(self, record: StepRecord, values: LateValues, everyone: Tensor) -> None:
        optimizer = self.optimizer.optimizer
        undo = self._schedule_as_it_is()
        optimizer.grad_scale, optimizer.found_inf = None, everyone.sum().clamp(max=1.0)
        try:
            self._take_step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf
        self._unread = (record, values, undo)

    def _schedule_as_it_is(self) -> Callable[[], None]:
        """→ what puts learning rates and their scheduler back to this moment."""
        groups = self.optimizer.param_groups
        # Deep copies: a learning rate may be a tensor, which schedulers change in place.
        settings = [copy.deepcopy({key: value for key, value in group.items() if key != "params"}) for group in groups]
        state = copy.deepcopy(self.scheduler.state_dict())

        def undo() -> None:
            self.scheduler.load_state_dict(state)
            for group, before in zip(groups, settings, strict=True):
                group.update(before)

        return undo

    def _leave_out(self) -> None:
        """As if the optimizer had not been asked: Accelerate then leaves the scheduler alone, too."""
        self.optimizer._is_overflow = True
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.update(new_scale=scaler.get_scale())  # forgets that it has unscaled; neither scale nor count change

    def settle(self) -> None:
        """Reads what is still unread of the last step; every process calls it at the same point.

        Raises:
            FloatingPointError: the step was not sound, and the policy is to stop.
        """
        if self._unread is None:
            return
        (record, values, undo), self._unread = self._unread, None
        if self._is_fault(values):
            undo()
            self._fault(record, values)

    @staticmethod
    def _is_fault(values: LateValues) -> bool:
        return sum(values.read()[3:]) > 0

    def _fault(self, record: StepRecord, values: LateValues) -> None:
        loss, gradient, norm, losses, gradients, _ = values.read()
        self.skipped += 1
        self.report(Fault(record, affected=bool(loss if losses else gradient if gradients else norm)))


class LateValues:
    """The values of a small tensor as they are now, to be read later: on CUDA without waiting for what was queued
    since."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:
            self._values = tensor.cpu().clone()

    def read(self) -> list[float]:
        """The values; waits until the device has passed the point where they were taken."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()
