"""Processes that share one sharded model run the same number of forward passes.

Under FSDP (and DeepSpeed ZeRO-3) a forward pass gathers weights from all processes: a process that has fewer prompts,
or whose rows end sooner, must go on calling the model or the others wait for ever. Before each pass every process says
whether it has work. A process that has does not look at the answer, so it never waits for it; one that has not runs a
dummy pass as long as another has.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass of the model is a collective operation."""
    if any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules()):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


class Lockstep:
    """Announces the forward passes of this process.

    Args:
        enabled: False makes every call do nothing.
        device: where the announcement lives (an accelerator's own for NCCL).
        group: the processes that share the model; None is all.
    """

    def __init__(self, enabled: bool, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self.enabled = enabled and dist.is_initialized() and dist.get_world_size(group) > 1
        self.device = device
        self.group = group
        self._pending: tuple[Tensor, dist.Work] | None = None

    def _announce(self, busy: int) -> tuple[Tensor, dist.Work]:
        flag = torch.full((1,), busy, dtype=torch.int32, device=self.device)
        return flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group, async_op=True)

    def tick(self) -> None:
        """Called before a real pass. The answer is known to be yes: it is not waited for."""
        if self.enabled:
            previous, self._pending = self._pending, self._announce(1)
            if previous is not None:
                previous[1].wait()  # over by now: the pass that followed it was itself a collective

    def others_go_on(self) -> bool:
        """Called where there is no work left: whether another process runs a pass now."""
        if not self.enabled:
            return False
        if self._pending is not None:
            self._pending[1].wait()
            self._pending = None
        flag, work = self._announce(0)
        work.wait()
        return bool(flag.item())
