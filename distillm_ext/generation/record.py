"""What was generated, gathered on the device and put in order once at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from distillm_ext.containers import SampledTokens


class Record:
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
