"""A teacher's output for some rows of a batch, compressed and packed: what stores and caches keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillm_ext.compressed_logits import CompressedLogits
from distillm_ext.models.frozen_teacher import ModelTeacher
from distillm_ext.models.logit_reader import TokenBatch
from distillm_ext.teacher import CompressionSettings
from distillm_ext.teacher.keys import draw_positions


def compute_records(
    teacher: ModelTeacher, settings: CompressionSettings, inputs: Mapping[str, Any], rows: Sequence[int]
) -> Tensor:
    """[targets of these rows of a collated batch, record_bytes] uint8 on the device, from a teacher forward."""
    return settings.pack(compute_compressed(teacher, settings, inputs, rows))


def compute_compressed(
    teacher: ModelTeacher, settings: CompressionSettings, inputs: Mapping[str, Any], rows: Sequence[int]
) -> CompressedLogits:
    """[targets of these rows of a collated batch] compressed logits on the device, from a teacher forward."""
    batch, targets = TokenBatch.from_inputs(inputs), inputs["targets"]
    keys, counts = inputs["keys"], inputs["row_targets"]
    device = targets.device
    if len(rows) < len(keys):
        batch, targets = _rows_of(batch, targets, rows, counts, device)
    position = None
    if settings.method == "sample":
        position = upload(draw_positions([keys[row] for row in rows], [counts[row] for row in rows]), device)
    labels = targets if settings.labels else None
    return teacher.compressed(batch, settings, labels, position)


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A host array on the device, without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _rows_of(
    batch: TokenBatch, targets: Tensor, rows: Sequence[int], counts: Sequence[int], device: torch.device
) -> tuple[TokenBatch, Tensor]:
    """The part of a batch that has these rows, with its targets. All indices are known on the host."""
    length = batch.input_ids.shape[1]
    ends = np.cumsum([0, *counts])
    chosen = np.concatenate([np.arange(ends[row], ends[row + 1]) for row in rows])
    moved = np.repeat([(row - place) * length for place, row in enumerate(rows)], [counts[row] for row in rows])
    index, chosen_targets = upload(np.asarray(rows, dtype=np.int64), device), upload(chosen, device)
    part = TokenBatch(
        batch.input_ids.index_select(0, index),
        batch.attention_mask.index_select(0, index),
        batch.positions.index_select(0, chosen_targets) - upload(moved.astype(np.int64), device),
    )
    return part, targets.index_select(0, chosen_targets)
