"""What is known of an optimizer step that was not taken because of NaN or inf: found out again, written down, reported.

The step left weights and optimizer as they were, so its micro-batches are run once more, without gradient and row by
row. Every process takes part, for a sharded student needs all of them; those affected write two files to `output_dir`
(`-rank-R` in their names where there is more than one process):

    nan-step-N.json           step, source, what was not finite, in which rows (with file and line), parameters
    nan-step-N.safetensors    the rows of the step: input_ids, attention_mask, labels [B, S], positions, targets [R],
                              row, prompt_length, micro_batch [B], row_loss [B] float32 (sum over the row's targets),
                              teacher_finite, student_finite [B] uint8; the plain text likewise, as text.*
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distillm_ext.compressed_logits import CompressedLogits
from distillm_ext.containers import LinearHead
from distillm_ext.data.draws import preserved_rng
from distillm_ext.data.rows.origin import name_row
from distillm_ext.models.logit_reader import StudentOutput, TeacherOutput, TokenBatch, head_logits
from distillm_ext.models.router_loss import ModelLoss
from distillm_ext.training.checkpoints.folders import write_json, write_tensors
from distillm_ext.training.faults.nan_policy import Fault
from distillm_ext.training.faults.nonfinite import nonfinite_weights
from distillm_ext.training.objectives import cross_entropy

if TYPE_CHECKING:
    from distillm_ext.training.trainer import DistillationTrainer

logger = logging.getLogger(__name__)
_POSITIONS = 256  # whose logits are formed at once
_COLUMNS = ("row_loss", "teacher_finite", "student_finite")


class NanReport:
    """Reports faults of a run; see `distillm_ext.training.faults.nan_policy`.

    Args:
        trainer: its `run`, `args`, `accelerator`, `data_collator` and `model_wrapped` are used as they are at the time
            of the fault.
    """

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def __call__(self, fault: Fault) -> None:
        """Finds out what was not finite, writes it down and says it.

        Raises:
            FloatingPointError: the policy is to stop, or weights are NaN or inf, which no skipped step cures.
        """
        args, record = self.trainer.args, fault.record
        with preserved_rng(args.device):
            findings = [self._examine(batch, record.step) for batch in record.batches]
        content = self._content(fault, findings)
        content["weights"], broken = nonfinite_weights(self.trainer.model_wrapped, self.trainer.accelerator)
        if fault.affected:
            self._write(record.step, content, record.batches, findings)
        text = self._text(fault, content)
        if args.nan_policy == "stop" or broken:
            raise FloatingPointError(text)
        logger.warning("%s", text)

    # ---- what was not finite

    @torch.no_grad()
    def _examine(self, batch: Mapping[str, Any], step: int) -> dict[str, Any]:
        """Runs a micro-batch again. → [B, 3] per row (`_COLUMNS`) of its rows and its plain text, and what the student
        adds to its loss by itself where that is not finite."""
        trainer, run, own = self.trainer, self.trainer.run, list[ModelLoss]()
        inputs: dict[str, Any] = dict(trainer._prepare_inputs(dict(batch)))
        objective, text = run.objectives.at(step - 1), inputs.get("plain_text")
        teacher = run.teaching.again(inputs) if objective.needs_teacher else None
        found: dict[str, Tensor] = {}

        def consume(rows: list[Any]) -> Tensor:
            truth = inputs.get("ground_truth", True)

            def loss(student: StudentOutput, at: slice) -> Tensor:
                part = None if teacher is None else _part(teacher, at)
                return objective(student, part, inputs["targets"][at], num_items=1, ground_truth=truth).total

            def text_loss(student: StudentOutput, at: slice) -> Tensor:
                return cross_entropy(student, inputs["plain_text"]["targets"][at], 1)

            found["rows"] = _per_row(rows[0], teacher, inputs["row_targets"], loss)
            if text is not None:
                found["text"] = _per_row(rows[1], None, text["row_targets"], text_loss)
            return found["rows"].sum()

        batches = [TokenBatch.from_inputs(inputs)]
        if text is not None:
            batches.append(TokenBatch.from_inputs(text))
        was_training = trainer.model_wrapped.training
        trainer.model_wrapped.eval()
        run.student(trainer.model_wrapped, batches, consume, fused=True, model_losses=own)
        trainer.model_wrapped.train(was_training)
        parts = {name: values.cpu() for name, values in found.items()}
        return {**parts, "own": sorted({loss.name for loss in own if not bool(torch.isfinite(loss.term).all())})}

    def _content(self, fault: Fault, findings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        record, args = fault.record, self.trainer.args
        rows, texts = self._bad_rows(record.batches, findings), _bad_texts(record.batches, findings)
        losses = [index for index, flag in enumerate(record.losses) if bool(flag)]
        gradients = record.gradients.tolist() if record.gradients is not None else []
        kinds = {kind for row in rows for kind in row["not_finite"]}
        kinds |= {kind for found in findings for kind in found["own"]}
        norm = record.norm is not None and bool(record.norm)
        places = {"loss": losses, "plain_text": texts, "gradient": any(gradients) or norm}
        kinds |= {name for name, bad in places.items() if bad}
        return {
            "step": record.step,
            "policy": args.nan_policy,
            "rank": args.process_index,
            "world_size": args.world_size,
            "source": record.source,
            "not_finite": sorted(kinds),
            "micro_batches": losses,
            "rows": rows,
            "plain_text_blocks": texts,
            "rows_of_the_step": [number for batch in record.batches for number in batch["row_numbers"]],
            "gradient_norm_overflows": norm and not any(gradients),
            "parameters": [name for name, bad in zip(record.names, gradients, strict=True) if bad],
        }

    def _bad_rows(
        self, batches: Sequence[Mapping[str, Any]], findings: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        found = []
        for index, (batch, finding) in enumerate(zip(batches, findings, strict=True)):
            for number, (loss, teacher, student) in zip(batch["row_numbers"], finding["rows"].tolist(), strict=True):
                flags = {"loss": _finite(loss), "teacher": bool(teacher), "student": bool(student)}
                bad = sorted(kind for kind, good in flags.items() if not good)
                # −inf may be a student's legal logit, where a vocabulary is masked.
                if bad not in ([], ["student"]):
                    place = {"row": number, "micro_batch": index, "not_finite": bad, "loss": str(loss)}
                    found.append(place | {"origin": self.trainer.run.row_origin(number)})
        return found

    # ---- what is said and written

    def _text(self, fault: Fault, content: Mapping[str, Any]) -> str:
        step, policy = content["step"], content["policy"]
        if not fault.affected:
            what = "NaN or inf on another process"
        else:
            what = f"NaN or inf in {', '.join(content['not_finite'])} ({content['source']} batch"
            if content["rows"]:
                what += f"; {'; '.join(_name(row) for row in content['rows'][:5])}"
            if content["parameters"]:
                what += f"; gradient of {content['parameters'][0]} and {len(content['parameters']) - 1} more"
            if content["gradient_norm_overflows"]:
                what += "; every gradient is finite, their norm overflows"
            what += f"); written to {self._stem(step)}.json and .safetensors"
        if content["weights"]:
            return (
                f"step {step}: {what}. Weights of the student are NaN or inf themselves ({content['weights'][0]}, "
                f"{len(content['weights'])} in all): go on from an earlier checkpoint, with a smaller learning_rate"
            )
        done = "the optimizer step was not taken, weights and optimizer are those before it"
        if policy == "skip":
            return f"step {step}: {what}; {done}"
        return f"step {step}: {what}; {done}. Correct or remove the rows, or set nan_policy='skip'"

    def _stem(self, step: int) -> Path:
        args = self.trainer.args
        rank = f"-rank-{args.process_index}" if args.world_size > 1 else ""
        return Path(str(args.output_dir)) / f"nan-step-{step}{rank}"

    def _write(
        self,
        step: int,
        content: Mapping[str, Any],
        batches: Sequence[Mapping[str, Any]],
        findings: Sequence[Mapping[str, Any]],
    ) -> None:
        stem = self._stem(step)
        stem.parent.mkdir(parents=True, exist_ok=True)
        tensors = _one_batch(batches, [found["rows"] for found in findings], self.trainer.data_collator)
        texts = [batch["plain_text"] for batch in batches if "plain_text" in batch]
        if texts:
            packed = _one_batch(texts, [found["text"] for found in findings], self.trainer.data_collator)
            tensors |= {f"text.{name}": tensor for name, tensor in packed.items()}
        write_tensors(stem.with_name(stem.name + ".safetensors"), tensors)
        write_json(stem.with_name(stem.name + ".json"), {**content, "tensors": stem.name + ".safetensors"})


def _per_row(student: StudentOutput, teacher: TeacherOutput | None, counts: Sequence[int], loss: Any) -> Tensor:
    """[B, 3] float32: loss, 1 where the teacher's logits are finite, 1 where the student's are.

    −inf is a legal logit of a teacher, a probability of 0; a student's makes divergences infinite.
    """
    values, start = [], 0
    for count in counts:
        at = slice(start, start + count)
        start += count
        part = _part(student, at)
        finite = _all(_finite_rows, part)
        good = torch.ones_like(finite) if teacher is None else _all(_defined_rows, _part(teacher, at)).to(finite.device)
        total = loss(part, at) if count else torch.zeros((), device=finite.device)
        values.append(torch.stack([total.float().reshape(()), good.float(), finite.float()]))
    return torch.stack(values)


def _all(test: Callable[[Any], Tensor], rows: Any) -> Tensor:
    """Whether `test` holds at every position; logits of a few positions at a time."""
    size = len(rows.hidden) if isinstance(rows, LinearHead) else len(rows)
    parts = [test(_part(rows, slice(start, start + _POSITIONS))) for start in range(0, max(size, 1), _POSITIONS)]
    return torch.cat(parts).all()


def _part(rows: Any, at: slice) -> Any:
    return dataclasses.replace(rows, hidden=rows.hidden[at]) if isinstance(rows, LinearHead) else rows[at]


def _logits(rows: StudentOutput) -> Tensor:
    return head_logits(rows) if isinstance(rows, LinearHead) else rows


def _finite_rows(student: StudentOutput) -> Tensor:
    return torch.isfinite(_logits(student)).all(-1)


def _defined_rows(teacher: Any) -> Tensor:
    """[R] bool: whether the teacher's logits are a distribution's."""
    if isinstance(teacher, CompressedLogits):
        return teacher.valid
    logits = _logits(teacher)
    return torch.isfinite(logits.logsumexp(-1)) & ~torch.isnan(logits).any(-1)


def _one_batch(batches: Sequence[Mapping[str, Any]], found: Sequence[Tensor], collator: Any) -> dict[str, Tensor]:
    """The rows of several micro-batches as one, with what was found of them."""
    features, places = [], []
    for index, batch in enumerate(batches):
        columns = (batch[name].cpu() for name in ("input_ids", "attention_mask", "labels", "prompt_length", "row"))
        for ids, mask, labels, prompt_length, row in zip(*columns, strict=True):
            real = mask.bool()
            features.append(
                {
                    "input_ids": ids[real].numpy(),
                    "loss_mask": (labels[real] >= 0).numpy(),
                    "prompt_length": int(prompt_length),
                    "row": int(row),
                }
            )
            places.append(index)
    tensors = {name: value for name, value in collator(features).items() if isinstance(value, Tensor)}
    values = torch.cat(list(found))
    extra = {name: values[:, place].to(torch.uint8) for place, name in enumerate(_COLUMNS) if place}
    return {**tensors, "micro_batch": torch.tensor(places), "row_loss": values[:, 0].contiguous(), **extra}


def _bad_texts(batches: Sequence[Mapping[str, Any]], findings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Blocks of plain text whose loss is not finite, by their numbers."""
    found = []
    for index, (batch, finding) in enumerate(zip(batches, findings, strict=True)):
        if "text" in finding:
            numbers, losses = batch["plain_text"]["row_numbers"], finding["text"][:, 0].tolist()
            found += [
                {"block": number, "micro_batch": index, "loss": str(loss)}
                for number, loss in zip(numbers, losses, strict=True)
                if not _finite(loss)
            ]
    return found


def _finite(value: float) -> bool:
    return value - value == 0.0


def _name(row: Mapping[str, Any]) -> str:
    """One bad row in a few words."""
    return f"{name_row(row['row'], row['origin'])}: {', '.join(row['not_finite'])}"
