"""Which rows are done, told to the host without making it wait for the accelerator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class FinishedFlags:
    """A queue of flags on their way to the host.

    On the CPU they are read at once. On CUDA the copy is started behind the step that made them and read one step
    later, when it has long arrived: the host stays a step ahead of the device. A row that is done then takes one more
    step, whose token is discarded (`Record.add`).

    Args:
        device: of the flags.
    """

    def __init__(self, device: torch.device) -> None:
        self.lag = 0 if device.type == "cpu" else 1
        self._queue: list[tuple[list[int], Tensor, torch.cuda.Event | None]] = []

    def push(self, rows: Sequence[int], going: Tensor) -> None:
        """Starts to send the flags [n] of `rows`."""
        if going.device.type == "cpu":
            self._queue.append((list(rows), going, None))
            return
        event = None
        pinned = going.device.type == "cuda"
        flags = torch.empty(going.shape, dtype=going.dtype, pin_memory=pinned).copy_(going, non_blocking=pinned)
        if pinned:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(going.device))
        self._queue.append((list(rows), flags, event))

    def read(self) -> set[int]:
        """Rows known to be done."""
        done: set[int] = set()
        while len(self._queue) > self.lag:
            rows, flags, event = self._queue.pop(0)
            if event is not None:
                event.synchronize()
            done.update(row for row, going in zip(rows, flags.tolist(), strict=True) if not going)
        return done
