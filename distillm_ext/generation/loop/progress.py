"""How far a batch is: the tokens drawn so far, on the device until the end, and which rows are done."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distillm_ext.containers import SampledTokens


class DrawnTokens:
    """Tokens of all rows, step by step.

    Args:
        count: rows.
        width: most tokens of a row.
        device: of the tokens.
    """

    def __init__(self, count: int, width: int, device: torch.device) -> None:
        self.count, self.width, self.device = count, width, device
        self._parts: list[tuple[Tensor, ...]] = []

    def add(self, rows: Tensor, age: Tensor, drawn: SampledTokens, going: Tensor, ended: Tensor) -> None:
        """Takes one token of each of `rows`, the `age`-th of the row. Where not `going` the row was done before."""
        # What a row that is done still drew goes to a column behind the last, which is cut off.
        column = torch.where(going, age, self.width)
        self._parts.append((rows, column, drawn.tokens, drawn.logprobs, drawn.filtered_logprobs, ended))

    def gather(self, pad_token_id: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """→ tokens [rows, width], logprobs, filtered_logprobs (float32), lengths [rows], finished [rows]."""
        shape = (self.count, self.width + 1)
        tokens = torch.full(shape, pad_token_id, dtype=torch.int64, device=self.device)
        raw = torch.zeros(shape, dtype=torch.float32, device=self.device)
        filtered = raw.clone()
        present = torch.zeros(shape, dtype=torch.bool, device=self.device)
        ends = present.clone()
        if self._parts:
            rows, columns, drawn, raw_parts, filtered_parts, ended = (
                torch.cat(parts) for parts in zip(*self._parts, strict=True)
            )
            place = (rows, columns)
            tokens[place] = drawn.long()
            raw[place] = raw_parts.float()
            filtered[place] = filtered_parts.float()
            present[place] = True
            ends[place] = ended
        present[:, -1] = ends[:, -1] = False
        lengths = present.sum(dim=1)
        return tokens[:, :-1], raw[:, :-1], filtered[:, :-1], lengths, ends.any(dim=1)


class FinishedFlags:
    """A queue of flags on their way to the host.

    On the CPU they are read at once. On CUDA the copy is started behind the step that made them and read one step
    later, when it has long arrived: the host stays a step ahead of the device. A row that is done then takes one more
    step, whose token is discarded (`DrawnTokens.add`).

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
