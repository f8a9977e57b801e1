"""The plain-text language-modelling term: its rows and their order.

DistiLLM adds a next-token loss on a plain corpus to keep the student's general ability. The order of its rows is a
function of (seed, epoch over the corpus), and the rows of a step one of its number: nothing to save, nothing to lose.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset

from distillm_ext.data.batches import DistillationCollator, move_batch
from distillm_ext.data.draws import Stream, generator
from distillm_ext.data.rows.checks import type_name
from distillm_ext.data.rows.files import warn_unused


def pack_text(dataset: Dataset, tokenizer: Any, *, max_length: int, source: str = "lm_dataset") -> list[np.ndarray]:
    """Joins the rows' tokens, each followed by EOS, and cuts them into blocks.

    Args:
        dataset: rows with a `text` column, or with `input_ids` already.
        tokenizer: a Hugging Face tokenizer; not used for `input_ids`.
        max_length: tokens per block. A last block of fewer than two tokens is dropped.
        source: what to call the data set in messages.

    Raises:
        ValueError: neither column is there, or there is not enough text for one block of two tokens,
            or a row is null or of another type (message: the row).
    """
    columns = dataset.column_names
    if "input_ids" in columns:
        pieces = [_ids(ids, source, number) for number, ids in enumerate(dataset["input_ids"], start=1)]
    elif "text" in columns:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        texts = list(dataset["text"])
        for number, text in enumerate(texts, start=1):
            if not isinstance(text, str):
                raise ValueError(f"{source}, row {number}: text must be a string, got {type_name(text)}")
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        pieces = [np.asarray([*ids, *end], dtype=np.int64) for ids in rows]
    else:
        raise ValueError(f"{source}: expected a column 'text' (or 'input_ids'), got {', '.join(columns) or 'none'}")
    warn_unused([name for name in columns if name != ("input_ids" if "input_ids" in columns else "text")], source)
    stream = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
    blocks = [stream[start : start + max_length] for start in range(0, len(stream), max_length)]
    blocks = [block for block in blocks if len(block) >= 2]
    if not blocks:
        raise ValueError(f"{source}: holds {len(stream)} tokens, too few for one block; give it more text")
    return blocks


def _ids(ids: Any, source: str, number: int) -> np.ndarray:
    if not isinstance(ids, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ValueError(f"{source}, row {number}: input_ids must be a list of integers; correct or remove the row")
    return np.asarray(ids, dtype=np.int64)


class PlainTextBatches:
    """Micro-batches of plain text for any optimizer step.

    Args:
        blocks: token blocks of `pack_text`.
        collator: makes batches.
        batch_size: rows per micro-batch and process.
        micro_batches: micro-batches of a full optimizer step.
        seed: run seed.
        rank, world_size: this process among all.
        device: where batches go.
    """

    def __init__(
        self,
        blocks: list[np.ndarray],
        collator: DistillationCollator,
        *,
        batch_size: int,
        micro_batches: int,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.blocks = blocks
        self.collator = collator
        self.batch_size = batch_size
        self.micro_batches = micro_batches
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self._epoch_order: tuple[int, np.ndarray] | None = None

    def step(self, step: int, micro_batches: int) -> list[dict[str, Any]]:
        """The first `micro_batches` (fewer at the end of an epoch) micro-batches of one optimizer step on this rank.

        A step takes the same rows however it is split into micro-batches and ranks.
        """
        first = step * self.batch_size * self.micro_batches * self.world_size
        # Micro-batch m of rank r begins at row (m·world + r)·batch, as Accelerate deals out the data set.
        starts = [first + (m * self.world_size + self.rank) * self.batch_size for m in range(micro_batches)]
        return [self._batch([self._row(start + offset) for offset in range(self.batch_size)]) for start in starts]

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.blocks))
        return int(self._order(epoch)[offset])

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            order = generator(self.seed, Stream.PLAIN_TEXT, epoch).permutation(len(self.blocks))
            self._epoch_order = (epoch, order)
        return self._epoch_order[1]

    def _batch(self, rows: list[int]) -> dict[str, Any]:
        blocks = [self.blocks[row] for row in rows]
        features = [
            {"input_ids": block, "loss_mask": np.ones(len(block)), "prompt_length": 0, "row": row}
            for block, row in zip(blocks, rows, strict=True)
        ]
        return move_batch(self.collator(features), self.device)
