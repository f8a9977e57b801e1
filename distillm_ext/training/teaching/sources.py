"""What a loss reads of the teacher at the targets of a batch: its logits, or what was kept of them when they were last
computed.

`LiveTargets` runs the teacher in every step. `KeptTargets` runs it once per sequence: the compressed logits of
a sequence stay with its data row or with its place in the replay buffer, or come from a cache on disk, and the teacher
is asked only for the rows of a batch that are in neither. The loss reads records that were packed and unpacked in the
step that computes them too, so that it does not depend on where they came from.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from distillm_ext.compressed_logits import CompressedLogits
from distillm_ext.data.batches import DistillationCollator, move_batch
from distillm_ext.data.sequences import TokenSequence
from distillm_ext.models.frozen_teacher import ModelTeacher
from distillm_ext.models.logit_reader import TeacherOutput, TokenBatch
from distillm_ext.models.teacher_records import compute_records, upload
from distillm_ext.teacher.settings import CompressionSettings
from distillm_ext.training.teaching.stores import RecordSource, ReuseStores

logger = logging.getLogger(__name__)


class TeacherSource(Protocol):
    """What the losses read of the teacher, whatever gives it."""

    def targets(self, inputs: Mapping[str, Any]) -> TeacherOutput:
        """What the training loss reads for a collated batch."""
        ...

    def evaluation_targets(self, inputs: Mapping[str, Any]) -> TeacherOutput:
        """What the validation reads."""
        ...

    def again(self, inputs: Mapping[str, Any]) -> TeacherOutput:
        """What `targets` gave for a batch of this run; nothing is kept or counted."""
        ...

    def settle(self) -> None:
        """Every process: what was computed since the last call becomes part of the store of all of them."""
        ...

    def begin_step(self, source: str, batches: Sequence[Mapping[str, Any]], *, reusable: bool) -> None:
        """Announces the batches of an optimizer step, and whether their sequences come again."""
        ...

    def adopt(self, sequences: Sequence[TokenSequence]) -> None:
        """Keeps the teacher's output of exactly these replayed sequences; computes what is missing."""
        ...

    def counters(self) -> dict[str, float]:
        """What this process reports of the steps since the last call."""
        ...

    def sizes(self) -> dict[str, float]:
        """What this process holds."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON-serialisable state, equal on all ranks."""
        ...

    def pack(self) -> dict[str, Tensor]:
        """Tensors of this rank for a checkpoint."""
        ...

    def unpack(
        self, state: Mapping[str, Any], saved: Sequence[Mapping[str, Tensor]], replayed: Sequence[bytes]
    ) -> None:
        """Restores `state` and `pack`; `replayed` are the keys of the sequences in the replay buffer."""
        ...


class LiveTargets:
    """A `TeacherSource`: the teacher's logits (or its hidden states and head), of every batch; nothing is kept."""

    def __init__(self, model: ModelTeacher) -> None:
        self.model = model

    def targets(self, inputs: Mapping[str, Any]) -> TeacherOutput:
        return self.model.outputs(TokenBatch.from_inputs(inputs))

    evaluation_targets = targets
    again = targets

    def settle(self) -> None:
        pass

    def begin_step(self, source: str, batches: Sequence[Mapping[str, Any]], *, reusable: bool) -> None:
        pass

    def adopt(self, sequences: Sequence[TokenSequence]) -> None:
        pass

    def counters(self) -> dict[str, float]:
        return {}

    def sizes(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def pack(self) -> dict[str, Tensor]:
        return {}

    def unpack(
        self, state: Mapping[str, Any], saved: Sequence[Mapping[str, Tensor]], replayed: Sequence[bytes]
    ) -> None:
        pass


class KeptTargets:
    """A `TeacherSource`: compressed teacher logits, computed once per sequence.

    Args:
        settings: the compression.
        model: computes what is not there yet; None where everything must come from `cache`.
        cache: records by sequence, or None.
        stores: where computed records are kept.
        collator, batch_size: of the batches in which new sequences of the replay buffer meet the teacher.
        device: of the losses.
    """

    def __init__(
        self,
        settings: CompressionSettings,
        *,
        model: ModelTeacher | None,
        cache: RecordSource | None,
        stores: ReuseStores,
        collator: DistillationCollator,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.settings = settings
        self.teacher = model
        self.cache = cache
        self.stores = stores
        self.collator = collator
        self.batch_size = batch_size
        self.device = device
        self._reusable = False
        self._computed = self._reused = 0

    # ---- one batch

    def targets(self, inputs: Mapping[str, Any]) -> CompressedLogits:
        """The teacher sees the rows of the batch that are not known yet, and no others."""
        keys, counts = inputs["keys"], inputs["row_targets"]
        found = [self._find(key) for key in keys]
        missing = [index for index, records in enumerate(found) if records is None]
        self._computed += len(missing)
        self._reused += len(found) - len(missing)
        known = np.concatenate([self._nothing(), *(records for records in found if records is not None)])
        if len(known) != sum(count for count, records in zip(counts, found, strict=True) if records is not None):
            raise ValueError(f"teacher logits: the stored rows {_names(inputs, range(len(keys)))} have other targets")
        records = upload(known, self.device)
        if missing:
            computed = self._compute(inputs, missing)
            if self._reusable:
                self.stores.defer([(keys[index], counts[index]) for index in missing], computed)
            records = torch.cat([records, computed])
            if len(missing) < len(keys):
                order = _interleaved(counts, set(missing))
                records = records.index_select(0, upload(order, self.device))
        return self.settings.unpack(records)

    def evaluation_targets(self, inputs: Mapping[str, Any]) -> TeacherOutput:
        """The teacher's own logits where there is a teacher, else the cache's."""
        if self.teacher is not None:
            return self.teacher.outputs(TokenBatch.from_inputs(inputs))
        return self.again(inputs)

    def again(self, inputs: Mapping[str, Any]) -> TeacherOutput:
        before = self._computed, self._reused, self._reusable
        self._reusable = False
        targets = self.targets(inputs)
        self._computed, self._reused, self._reusable = before
        return targets

    def _find(self, key: bytes) -> np.ndarray | None:
        records = self.cache.get(key) if self.cache is not None else None
        return records if records is not None else self.stores.get(key)

    def _compute(self, inputs: Mapping[str, Any], rows: Sequence[int]) -> Tensor:
        """[targets of these rows, record_bytes] on the device, from the teacher."""
        if self.teacher is None:
            raise ValueError(
                f"teacher: the cache has no {_names(inputs, rows)} and there is no teacher model to compute it; "
                "capture the data set again with the tokenizer, max_prompt_length and max_length of this run, or give "
                "the model beside the cache"
            )
        return compute_records(self.teacher, self.settings, inputs, rows)

    def _nothing(self) -> np.ndarray:
        return np.empty((0, self.settings.record_bytes), dtype=np.uint8)

    # ---- a run

    def settle(self) -> None:
        self.stores.settle()

    def begin_step(self, source: str, batches: Sequence[Mapping[str, Any]], *, reusable: bool) -> None:
        self._reusable = reusable and self.teacher is not None
        if self._reusable:
            self.stores.begin_step(source, [row for batch in batches for row in batch["row_numbers"]])

    def adopt(self, sequences: Sequence[TokenSequence]) -> None:
        new = self.stores.retain_replayed(sequences)
        for start in range(0, len(new), self.batch_size):
            chunk = new[start : start + self.batch_size]
            inputs = move_batch(self.collator([sequence.to_feature() for sequence in chunk]), self.device)
            records = self._compute(inputs, range(len(chunk))).cpu().numpy()
            self._computed += len(chunk)
            ends = np.cumsum(inputs["row_targets"])[:-1]
            for sequence, part in zip(chunk, np.split(records, ends), strict=True):
                self.stores.replay.put(sequence.key, part)

    def counters(self) -> dict[str, float]:
        report: dict[str, float] = {"teacher_rows": self._computed, "reused_rows": self._reused}
        self._computed = self._reused = 0
        return report

    def sizes(self) -> dict[str, float]:
        return self.stores.sizes()

    def state(self) -> dict[str, Any]:
        return {"settings": asdict(self.settings) | {"temperatures": list(self.settings.temperatures)}}

    def pack(self) -> dict[str, Tensor]:
        return self.stores.pack()

    def unpack(
        self, state: Mapping[str, Any], saved: Sequence[Mapping[str, Tensor]], replayed: Sequence[bytes]
    ) -> None:
        if state.get("settings") != self.state()["settings"]:
            logger.warning(
                "the checkpoint has no teacher logits that were compressed as this run does; they are computed again"
            )
            return
        self.stores.unpack(saved, replayed)


def _names(inputs: Mapping[str, Any], rows: Sequence[int]) -> str:
    return "row " + ", ".join(str(inputs["row_numbers"][row]) for row in rows)


def _interleaved(counts: Sequence[int], computed: set[int]) -> np.ndarray:
    """Where each target of a batch lies when those of all known rows come first, then those of the computed ones."""
    groups = np.repeat([index in computed for index in range(len(counts))], counts)
    place = np.empty(len(groups), dtype=np.int64)
    place[np.argsort(groups, kind="stable")] = np.arange(len(groups))
    return place
