"""Validation: cross-entropy on the ground truth and divergence from the teacher, weighted by token over the whole set.

Averaging per-batch means would weight a short batch like a long one, and loaders repeat rows to fill batches or leave
the last ones out: all of it changes the loss that φ depends on. So every row reports sums under its number, each row
counts once, and a set of which rows are missing is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from distillm_ext.checks.sides import LossRequest
from distillm_ext.compressed_logits import CompressedLogits
from distillm_ext.containers import LinearHead
from distillm_ext.data.rows.origin import name_row, origin_of
from distillm_ext.functional import distillation_loss
from distillm_ext.linear import linear_cross_entropy_loss, linear_loss
from distillm_ext.models.logit_reader import StudentOutput, TeacherOutput, head_logits
from distillm_ext.ops.divergence import DivergenceOptions


def token_losses(
    student: StudentOutput, teacher: TeacherOutput, targets: Tensor, vocab_size: int | None, tail: str = "bucket"
) -> tuple[Tensor, Tensor]:
    """[R] student's cross-entropy over its whole vocabulary, [R] KL(teacher ‖ student) over `vocab_size` entries.

    Of compressed teacher logits the divergence is the one that `tail` names; with a bucket it is a lower bound.
    """
    tail = tail if isinstance(teacher, CompressedLogits) else "bucket"
    if not isinstance(student, LinearHead):
        teacher = (head_logits(teacher) if isinstance(teacher, LinearHead) else teacher).to(student.device)
        divergence = distillation_loss(
            student, teacher, targets, divergence="forward_kl", reduction="none", vocab_size=vocab_size,
            tail=tail,
        )  # fmt: skip
        return functional.cross_entropy(student.float(), targets, reduction="none"), divergence
    if not isinstance(teacher, LinearHead):
        teacher = teacher.to(student.hidden.device)
    whole = vocab_size in (None, student.weight.shape[0])
    request = LossRequest(targets, reduction="none", vocab_size=vocab_size, tail=tail)
    divergence, ce, _ = linear_loss(student, teacher, DivergenceOptions("forward_kl"), request, need_ce=whole)
    return ce if whole else linear_cross_entropy_loss(student, targets, reduction="none"), divergence


def row_sums(
    student: StudentOutput,
    teacher: TeacherOutput,
    targets: Tensor,
    rows: Tensor,
    num_rows: int,
    vocab_size: int | None,
    tail: str = "bucket",
) -> Tensor:
    """Sums per row over its targets.

    Args:
        student: [R, V] logits, or the head that makes them.
        teacher: [R, V_teacher] logits, the head that makes them, or what is kept of them.
        targets: [R] int64.
        rows: [R] int64, the batch row each target belongs to.
        num_rows: B.
        vocab_size: entries of both vocabularies that the divergence compares.
        tail: of compressed teacher logits.

    Returns:
        [B, 3] float32: cross-entropy of the student, KL(teacher ‖ student), number of targets.
    """
    ce, divergence = token_losses(student, teacher, targets, vocab_size, tail)
    values = torch.stack([ce, divergence.to(ce), torch.ones_like(ce)], dim=1)
    return torch.zeros(num_rows, 3, dtype=ce.dtype, device=ce.device).index_add_(0, rows, values)


class RowTotals:
    """Sums per row, by the row's number, from batches of any size and order on any number of processes."""

    def __init__(self, device: torch.device) -> None:
        self._rows = [torch.empty(0, dtype=torch.int64, device=device)]
        self._sums = [torch.empty(0, 3, dtype=torch.float64, device=device)]

    def add(self, rows: Tensor, sums: Tensor) -> None:
        """Adds the [B, 3] sums of one batch; `rows` [B] are the numbers of its rows."""
        self._rows.append(rows)
        self._sums.append(sums.double())

    def collect(self, accelerator: Any) -> tuple[np.ndarray, np.ndarray]:
        """→ (numbers [n], rising; sums [n, 3] float64) of the rows of all processes, each row once.

        Every process calls it. A sum over the result does not depend on how the rows were dealt out.
        """
        rows, sums = torch.cat(self._rows), torch.cat(self._sums)
        if accelerator.num_processes > 1:
            rows = accelerator.gather(accelerator.pad_across_processes(rows, dim=0, pad_index=-1))
            sums = accelerator.gather(accelerator.pad_across_processes(sums, dim=0))
        numbers, first = np.unique(rows.cpu().numpy(), return_index=True)
        real = numbers >= 0
        return numbers[real], sums.cpu().numpy()[first[real]]


def token_means(sums: np.ndarray, prefix: str) -> dict[str, float]:
    """Token-weighted means of [n, 3] row sums: `prefix_loss` (nats per token), `prefix_divergence`, `prefix_tokens`.

    Raises:
        ValueError: no target was seen, so there is nothing to average.
    """
    ce, divergence, count = sums.sum(axis=0).tolist() if len(sums) else (0.0, 0.0, 0.0)
    if count == 0:
        raise ValueError("eval_dataset: holds no response token; check its loss_mask and max_length")
    return {f"{prefix}_loss": ce / count, f"{prefix}_divergence": divergence / count, f"{prefix}_tokens": count}


def nonfinite_rows(rows: np.ndarray, sums: np.ndarray, dataset: Any, prefix: str) -> str | None:
    """The rows of an evaluation whose sums are NaN or inf, in a sentence; None where all are finite.

    Args:
        rows: [n] numbers of the rows.
        sums: [n, 3] of `RowTotals.collect`.
        dataset: the prepared rows, whose file and lines are named where they are known.
        prefix: of the metrics.
    """
    bad = ~np.isfinite(sums[:, :2])
    if not bad.any():
        return None
    found, origin = np.flatnonzero(bad.any(axis=1)), origin_of(dataset)
    named = []
    for place in found[:5]:
        kinds = [kind for kind, flag in zip(("loss", "divergence"), bad[place], strict=True) if flag]
        number = int(rows[place])
        named.append(f"{name_row(number, origin(number))}: {', '.join(kinds)}")
    metrics = [f"{prefix}_{kind}" for kind, flag in zip(("loss", "divergence"), bad.any(axis=0), strict=True) if flag]
    return f"NaN or inf in {' and '.join(metrics)}: {len(found)} of {len(rows)} rows ({'; '.join(named)})"


@dataclass(frozen=True)
class TokenMetrics:
    """What an evaluation found.

    Attributes:
        metrics: of `token_means`.
        num_rows: rows it was taken from.
        not_finite: see `nonfinite_rows`.
    """

    metrics: dict[str, float]
    num_rows: int
    not_finite: str | None


def evaluate_by_token(
    loader: Any, sums_of: Callable[[Any], tuple[Tensor, Tensor]], *, accelerator: Any, description: str, prefix: str
) -> TokenMetrics:
    """Cross-entropy and divergence over a whole set, each row once; no predictions are kept.

    Args:
        loader: batches of prepared rows, `loader.dataset`, on any number of processes; every process calls.
        sums_of: batch → (numbers [B] of its rows, [B, 3] sums of `row_sums`).
        accelerator: of the run.
        description: of the evaluation, for the error.
        prefix: of the metrics.

    Raises:
        RuntimeError: the loader left rows out.
    """
    totals = RowTotals(accelerator.device)
    for inputs in loader:
        totals.add(*sums_of(inputs))
    rows, sums = totals.collect(accelerator)
    expected = len(loader.dataset)
    if len(rows) != expected:
        raise RuntimeError(f"{description}: {len(rows)} of {expected} rows were seen; the loader leaves rows out")
    return TokenMetrics(token_means(sums, prefix), len(rows), nonfinite_rows(rows, sums, loader.dataset, prefix))


def evaluation_model(model: Any, optimizer: Any, accelerator: Any) -> Any:
    """The student in evaluation mode, prepared where no training has done so."""
    if not accelerator._models:
        model = accelerator.prepare_model(model, evaluation_mode=True)
    model.eval()
    if callable(getattr(optimizer, "eval", None)):  # some optimizers train with other weights than they give
        optimizer.eval()
    return model


@contextlib.contextmanager
def whole_set(args: Any, accelerator: Any, *, keep_workers: bool) -> Iterator[None]:
    """Options under which transformers makes a loader that leaves no row out.

    Without `even_batches` a process may have no last batch, and the others would wait for it in the forward pass.
    transformers keeps a loader of persistent workers under one name for every set that it is handed: a set that is none
    of the trainer's own must not get the loader of another, so its workers are not kept.
    """
    before = args.dataloader_drop_last, args.dataloader_persistent_workers, accelerator.even_batches
    args.dataloader_drop_last, accelerator.even_batches = False, True
    args.dataloader_persistent_workers = before[1] and keep_workers
    try:
        yield
    finally:
        args.dataloader_drop_last, args.dataloader_persistent_workers, accelerator.even_batches = before
