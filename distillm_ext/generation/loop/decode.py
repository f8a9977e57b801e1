"""The decode loop: rows join the batch when there is room, take a token per step, and leave when they are done."""

from __future__ import annotations

import torch
from torch import Tensor

from distillm_ext.generation.loop.batching import pass_cost, prefill_groups
from distillm_ext.generation.loop.cache import RowCache, column_mask
from distillm_ext.generation.loop.forward import CausalForward
from distillm_ext.generation.loop.progress import DrawnTokens, FinishedFlags
from distillm_ext.generation.request import Request


class DecodeLoop:
    """Generates all rows of a request.

    The batch is `self.rows`: slot i holds row `rows[i]` of the request. Its text lies in the columns from `starts[i]`
    on and ends, like every other row's, at `self.stop`. A row that is done is replaced by the last one, so nothing else
    moves; new rows are prefilled behind it. Rows of any age share a step, each with its own position.

    Args:
        forward: the model.
        request: what to generate.
        slots: most rows in the batch.
        record: where tokens go.
    """

    def __init__(self, forward: CausalForward, request: Request, slots: int, record: DrawnTokens) -> None:
        self.forward, self.request, self.record = forward, request, record
        self.slots = min(slots, len(request.lengths))
        self.waiting = list(range(len(request.lengths)))
        self.rows: list[int] = []
        self.starts: list[int] = []
        self.stop = 0
        device = forward.device
        # Per slot, on the device: row of the request, tokens generated, last token, start column, still going.
        self.row = self.age = self.token = self.start = torch.zeros(0, dtype=torch.int64, device=device)
        self.going = torch.zeros(0, dtype=torch.bool, device=device)
        self.flags = FinishedFlags(device)
        # Prompt, and one column per token: a batch that outlives that moves its columns to the left.
        self.columns = max(request.lengths) + record.width
        self.cache = RowCache(forward.config, self.slots, self.columns)

    def run(self) -> None:
        """Until every row is done."""
        while self.waiting or self.rows:
            if self._has_room():
                self._admit()
            else:
                self._step()
            self._drop(self.flags.read())

    # ---- rows join

    def _has_room(self) -> bool:
        """Prefilling a few rows costs a pass: wait for a quarter of the slots, unless the batch is empty."""
        if not self.waiting or not self.rows:
            return bool(self.waiting)
        free = self.slots - len(self.rows)
        return free >= min(len(self.waiting), max(1, self.slots // 4))

    def _admit(self) -> None:
        count = min(self.slots - len(self.rows), len(self.waiting))
        joining, self.waiting = self.waiting[:count], self.waiting[count:]
        lengths = [self.request.lengths[row] for row in joining]
        if not self.rows:
            self.stop = lengths[0]
        for first, last in prefill_groups(lengths, cost=pass_cost(self.forward.device)):
            self._prefill(joining[first:last])

    def _prefill(self, joining: list[int]) -> None:
        """Runs prompts through the model; they end at `self.stop` and take the slots behind the rows that are there."""
        request, device = self.request, self.forward.device
        width = request.lengths[joining[0]]
        rows = torch.tensor(joining, device=device)
        lengths = [request.lengths[row] for row in joining]
        padding = torch.tensor([width - length for length in lengths], device=device)
        mask = None if lengths[-1] == width else column_mask(padding, width)
        positions = (torch.arange(width, device=device) - padding.unsqueeze(1)).clamp_(min=0)
        left = self.stop - width
        self._aim(len(self.rows), len(self.rows) + len(joining), left, left)
        if left > 0:
            self.cache.clear(slice(len(self.rows), len(self.rows) + len(joining)), slice(0, left))
        ids = request.prompts[rows, request.prompts.shape[1] - width :]
        logits = self.forward(ids, mask, positions, self.cache)
        self.rows += joining
        self.starts += [self.stop - length for length in lengths]
        zeros = torch.zeros_like(rows)
        self.row, self.age = torch.cat([self.row, rows]), torch.cat([self.age, zeros])
        self.start = torch.cat([self.start, padding + left])
        self.token = torch.cat([self.token, zeros])
        self.going = torch.cat([self.going, zeros == 0])
        self._sample(logits, slice(len(self.rows) - len(joining), None))

    def _aim(self, first: int, last: int, start: int, stop: int) -> None:
        window = self.cache.window
        window.first, window.last, window.start, window.stop = first, last, start, stop

    # ---- rows go on

    def _step(self) -> None:
        """One token for every row of the batch."""
        first = min(self.starts)
        if self.stop == self.columns:
            first = self._move_left(first)
        self._aim(0, len(self.rows), first, self.stop)
        width = self.stop + 1 - first
        mask = None if self.starts.count(first) == len(self.starts) else column_mask(self.start - first, width)
        # A row that is done may still be here: its position stands still, lest it leave the model's range.
        positions = torch.where(self.going, self.stop - self.start, 0).unsqueeze(1)
        logits = self.forward(self.token.unsqueeze(1), mask, positions, self.cache)
        self.stop += 1
        self._sample(logits, slice(None))

    def _move_left(self, first: int) -> int:
        """Columns that only rows long gone had used make room on the right."""
        self.cache.move_columns(len(self.rows), first, self.stop)
        self.starts = [start - first for start in self.starts]
        self.start = self.start - first
        self.stop -= first
        return 0

    def _sample(self, logits: Tensor, slots: slice) -> None:
        rows, age = self.row[slots], self.age[slots]
        drawn, ended, more = self.request.draw(logits, rows, age)
        self.record.add(rows, age, drawn, self.going[slots], ended)
        going = self.going[slots] & more
        self.token, self.age, self.going = (
            torch.cat([whole[: slots.start or 0], part])
            for whole, part in ((self.token, drawn.tokens), (self.age, age + 1), (self.going, going))
        )
        self.flags.push(self.rows[slots], going)

    # ---- rows leave

    def _drop(self, done: set[int]) -> None:
        keep = [slot for slot, row in enumerate(self.rows) if row not in done]
        if len(keep) == len(self.rows):
            return
        order = self._fill_holes(keep)
        index = torch.tensor(order, dtype=torch.int64, device=self.forward.device)
        self.rows, self.starts = [self.rows[slot] for slot in order], [self.starts[slot] for slot in order]
        for name in ("row", "age", "token", "start", "going"):
            setattr(self, name, getattr(self, name)[index])

    def _fill_holes(self, keep: list[int]) -> list[int]:
        """→ the slots that stay, in their new order: each hole is taken by the last row behind it."""
        count = len(keep)
        holes = sorted(set(range(count)) - set(keep))
        moved = [slot for slot in keep if slot >= count]
        if holes:
            self._aim(0, len(self.rows), min(self.starts), self.stop)
            source, target = (torch.tensor(slots, device=self.forward.device) for slots in (moved, holes))
            self.cache.move_rows(source, target)
        order = list(range(count))
        for hole, slot in zip(holes, moved, strict=True):
            order[hole] = slot
        return order
