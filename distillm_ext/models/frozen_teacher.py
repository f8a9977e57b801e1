"""The teacher as a source of logits and of responses: frozen, in evaluation mode, never part of what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distillm_ext.compressed_logits import CompressedLogits
from distillm_ext.compression import capture_from_hidden, compress_logits
from distillm_ext.containers import TeacherHead
from distillm_ext.models.checks import check_causal
from distillm_ext.models.logit_reader import LogitReader, TokenBatch
from distillm_ext.teacher.settings import CompressionSettings

TEACHER_DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class ModelTeacher:
    """Logits from a causal language model.

    The model is frozen and put into evaluation mode in place. It is neither wrapped nor autocast: it runs in its own
    dtype.

    Args:
        model: causal LM; its vocabulary may differ in size from the student's.
        device: where to put it. A model that was spread over devices (`hf_device_map`) or quantised stays where it is.
        dtype: a name of `TEACHER_DTYPES`; "auto" keeps the dtype it was loaded in.

    Raises:
        TypeError: `model` is not a causal LM of transformers.
    """

    def __init__(self, model: Any, *, device: torch.device, dtype: str = "auto") -> None:
        check_causal(model, "teacher")
        placed = getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)
        if not placed:
            model.to(device=device, dtype=TEACHER_DTYPES[dtype])
        self.model = model.requires_grad_(False).eval()
        self.reader = LogitReader(model)
        self.device = device

    def verify(self, token_ids: Sequence[int]) -> bool:
        """See `LogitReader.verify`."""
        return self.reader.verify(token_ids, "teacher")

    @torch.no_grad()
    def logits(self, batch: TokenBatch) -> Tensor:
        """[R, V_teacher] logits at the batch's positions."""
        return self.reader.logits(batch)

    @torch.no_grad()
    def outputs(self, batch: TokenBatch) -> Tensor | TeacherHead:
        """What a loss that is fused with the heads needs: hidden states and head, or logits where it must.

        It must where the head is not a plain linear one, or not on the device of the run.
        """
        reader = self.reader
        if not reader.fuses() or reader.head.weight.device != self.device:
            return reader.logits(batch)
        head, transform = reader.head, reader.transform
        return TeacherHead(reader.hidden(batch), head.weight, head.bias, transform.softcap, transform.scale)

    @torch.no_grad()
    def compressed(
        self, batch: TokenBatch, settings: CompressionSettings, targets: Tensor | None, position: Tensor | None
    ) -> CompressedLogits:
        """What `settings` keep of the logits at the batch's positions; where the head allows, no logits are formed.

        Args:
            batch: tokens and positions.
            settings: the compression.
            targets: [R], the labels whose log-probability is kept, or None.
            position: [R] int64, needed by method "sample".
        """
        options: dict[str, Any] = dict(
            method=settings.method, temperatures=settings.temperatures, labels=targets, seed=settings.seed,
            position=position,
        )  # fmt: skip
        rows, size = self.outputs(batch), settings.vocab_size
        if isinstance(rows, Tensor):
            return compress_logits(rows[:, :size], settings.k, **options)
        bias = None if rows.bias is None else rows.bias[:size]
        return capture_from_hidden(
            rows.hidden, rows.weight[:size], settings.k, bias=bias, softcap=rows.softcap, scale=rows.scale, **options
        )
