"""Compressed teachers in the losses: checks, and the container as rows for the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compressed_logits import CompressedLogits
from ..ops.divergence import DivergenceOptions, loss_dtype
from ..ops.sparse_divergence import CompressedRows
from .logits import check_vocab_size

SPARSE_DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "generalized_js",
    "total_variation",
)
# Those that are the expectation of something that a sampled entry alone determines.
SAMPLED_DIVERGENCES = ("forward_kl", "skew_kl", "skew_reverse_kl", "total_variation")


def checked_compressed(
    teacher: CompressedLogits,
    options: DivergenceOptions,
    tail: str,
    positions: torch.Size,
    student_vocab: int,
    vocab_size: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> CompressedRows:
    """The teacher, checked against the student's positions, dtype and device, flattened for the operator."""
    _check_container(teacher, positions, device)
    _check_form(teacher, options, tail)
    at = _temperature_index(teacher, options.temperature)
    wide = loss_dtype(dtype)
    k = teacher.ids.shape[-1]
    log_norm = teacher.log_norm[..., at].masked_fill(~teacher.valid, torch.nan)
    rows = CompressedRows(
        teacher.ids.reshape(-1, k),
        teacher.logprobs.detach().reshape(-1, k).to(wide),
        log_norm.detach().reshape(-1).to(wide),
        teacher.tail_logprob[..., at].detach().reshape(-1).to(wide),
        teacher.counts.reshape(-1, k) if tail == "sampled" and teacher.counts is not None else None,
        teacher.vocab_size,
        tail,
    )
    if vocab_size is None:
        check_vocabularies(options, student_vocab, teacher.vocab_size)
        return rows
    check_vocab_size(vocab_size, min(student_vocab, teacher.vocab_size))
    return _cut(rows, vocab_size, options.temperature) if vocab_size < teacher.vocab_size else rows


def _check_container(teacher: CompressedLogits, positions: torch.Size, device: torch.device) -> None:
    ids, count = teacher.ids, len(teacher.temperatures)
    if ids.dtype != torch.int32:
        raise TypeError(f"teacher.ids must be int32, got {ids.dtype}.")
    if ids.shape[:-1] != positions:
        raise ValueError(
            f"teacher must have the positions of the student, {list(positions)}, got {list(ids.shape[:-1])}; select or "
            "pad the same tokens on both sides."
        )
    expected = {
        "logprobs": ids.shape,
        "log_norm": (*positions, count),
        "tail_logprob": (*positions, count),
        "valid": positions,
        "counts": ids.shape,
    }
    for name in ("ids", *expected):
        value = getattr(teacher, name)
        if value is None:
            continue
        if name in expected and value.shape != expected[name]:
            raise ValueError(f"teacher.{name} must have shape {list(expected[name])}, got {list(value.shape)}.")
        if value.device != device:
            raise ValueError(f"teacher.{name} must be on the device of the student, {device}, got {value.device}.")
    if teacher.counts is not None and teacher.counts.dtype != torch.int32:
        raise TypeError(f"teacher.counts must be int32, got {teacher.counts.dtype}.")


def _check_form(teacher: CompressedLogits, options: DivergenceOptions, tail: str) -> None:
    """Whether this divergence can be had from this teacher with this tail."""
    name = options.divergence
    if name not in SPARSE_DIVERGENCES:
        raise ValueError(
            f"{name} needs the teacher's logits; from CompressedLogits there are {', '.join(SPARSE_DIVERGENCES)}."
        )
    if tail != "sampled":
        return
    if teacher.counts is None:
        raise ValueError("tail='sampled' needs a teacher compressed with method='sample', got method='topk'.")
    if name not in SAMPLED_DIVERGENCES or (name == "skew_reverse_kl" and options.alpha == 0):
        what = name if options.alpha != 0 or name != "skew_reverse_kl" else "skew_reverse_kl with alpha=0"
        raise ValueError(
            f"{what} has no unbiased form from sampled entries: it is no expectation under the teacher of what the "
            f"sampled entries alone determine. tail='sampled' has {', '.join(SAMPLED_DIVERGENCES)}; other divergences "
            "need tail='bucket', 'truncate' or 'renormalize'."
        )
    if options.temperature != 1:
        raise ValueError(
            f"tail='sampled' needs temperature=1, got {options.temperature}: the entries were drawn at 1, and draws "
            "from one distribution give no unbiased estimate under another whose normaliser they do not determine."
        )


def _temperature_index(teacher: CompressedLogits, temperature: float) -> int:
    for index, captured in enumerate(teacher.temperatures):
        if abs(captured - temperature) <= 1e-6 * captured:
            return index
    listed = ", ".join(str(t) for t in teacher.temperatures)
    raise ValueError(
        f"temperature {temperature} was not captured: the teacher has {listed}. The mass of its tail at another "
        "temperature cannot be recovered; use one of these or compress_logits(..., temperatures=...)."
    )


def check_vocabularies(options: DivergenceOptions, student: int, teacher: int) -> None:
    """Refuses what would be infinite wherever the teacher's kept entries reach beyond the student's vocabulary."""
    forward = options.divergence == "forward_kl" or (options.divergence == "skew_kl" and options.alpha == 0)
    if forward and teacher > student:
        raise ValueError(
            f"{options.divergence} is infinite when the teacher has entries that the student lacks ({student} student, "
            f"{teacher} teacher entries); pass vocab_size={student} to use the entries that both have."
        )


def _cut(rows: CompressedRows, vocab_size: int, temperature: float) -> CompressedRows:
    """The teacher's distribution over the first `vocab_size` entries. What was not kept counts as lying among them."""
    if rows.tail == "sampled":
        raise ValueError(
            f"vocab_size={vocab_size} cuts a sampled teacher of {rows.vocab_size} entries, which biases what its draws "
            "estimate; compress logits[..., :vocab_size] instead."
        )
    inside = (rows.ids >= 0) & (rows.ids < vocab_size)
    kept = (rows.logprobs / temperature - rows.log_norm.unsqueeze(-1)).masked_fill(~inside, -torch.inf)
    remaining = torch.logaddexp(kept.logsumexp(-1), rows.tail_logprob)
    return rows._replace(
        log_norm=rows.log_norm + remaining,
        tail_logprob=_minus(rows.tail_logprob, remaining),
        vocab_size=vocab_size,
    )


def _minus(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log(a / b), log 0 for a = 0."""
    return torch.where(log_a == -torch.inf, log_a, log_a - log_b)
