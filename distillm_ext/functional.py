"""Distillation losses: the stateless public API.

Checks arguments once, flattens positions to rows, turns masks and reduction into row weights, calls the operator.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .checks.compressed import checked_compressed
from .checks.logits import (
    SideRows,
    cap_tensor,
    check_inplace,
    check_logits,
    check_tail,
    check_vocab_size,
    check_vocabularies,
    deferred_weight,
    weight_of_rows,
)
from .checks.options import DIVERGENCES as DIVERGENCES
from .checks.options import check_powers, checked_options
from .compressed_logits import CompressedLogits
from .containers import DivergenceMetrics
from .ops.divergence import DivergenceOptions, RowSides, loss_dtype
from .ops.divergence import divergence as divergence_op
from .ops.divergence_inplace import divergence_inplace
from .ops.sparse_divergence import CompressedRows, sparse_divergence


class _Request(NamedTuple):
    """How a loss is to be computed, beside its hyper-parameters."""

    vocab_size: int  # 0: all
    inplace: bool
    metrics: bool


@overload
def distillation_loss(
    student_logits: Tensor,
    teacher: Tensor | CompressedLogits,
    labels: Tensor | None = None,
    *,
    return_metrics: Literal[True],
    **options: Any,
) -> tuple[Tensor, DivergenceMetrics]: ...


@overload
def distillation_loss(
    student_logits: Tensor,
    teacher: Tensor | CompressedLogits,
    labels: Tensor | None = None,
    *,
    return_metrics: Literal[False] = False,
    **options: Any,
) -> Tensor: ...


# The overloads tell the return type alone; the options are those here.
def distillation_loss(  # type: ignore[misc]
    student_logits: Tensor,
    teacher: Tensor | CompressedLogits,
    labels: Tensor | None = None,
    *,
    divergence: str = "skew_kl",
    alpha: float | Tensor | None = None,
    beta: float | None = None,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    cap: float | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    ce_weight: float = 0.0,
    detach_mixture: bool = False,
    tail: str = "bucket",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    inplace: bool = False,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, DivergenceMetrics]:
    r"""Divergence of a student from its teacher, token by token, with the gradient from the same kernel call.

    With :math:`p = \mathrm{softmax}(z^{teacher}/T)` and :math:`q = \mathrm{softmax}(z^{student}/T)`, per position:

    ==================  ====================================================================================
    forward_kl          :math:`KL(p \| q)` (Hinton et al., 2015)
    reverse_kl          :math:`KL(q \| p)` (MiniLLM, Gu et al., ICLR 2024)
    symmetric_kl        :math:`(1-\beta) KL(p \| q) + \beta KL(q \| p)` (DistiLLM's code)
    skew_kl             :math:`KL(p \| \alpha p + (1-\alpha) q)` (DistiLLM, Ko et al., ICML 2024)
    skew_reverse_kl     :math:`KL(q \| (1-\alpha) p + \alpha q)` (DistiLLM)
    generalized_js      :math:`\beta KL(p \| m) + (1-\beta) KL(q \| m),\; m = \beta p + (1-\beta) q`; beta = 0 is
                        forward_kl, 1 is reverse_kl (GKD, Agarwal et al., ICLR 2024)
    total_variation     :math:`\tfrac12 \sum |p - q|` (f-DISTILL, Wen et al., ACL 2023)
    alpha_beta          :math:`\frac{-1}{ab} \sum [p^a q^b - \frac{a}{a+b} p^{a+b} - \frac{b}{a+b} q^{a+b}]`, a = alpha,
                        b = beta; (1, 0) is forward_kl, (0, 1) reverse_kl (ABKD, Wang et al., ICML 2025)
    token_adaptive      :math:`\sum w p \log\frac pq + (1-w) q \log\frac qp`, :math:`w = \frac p{p+q}` held constant
                        (ToDi, Jung et al., EMNLP 2025)
    adaptive_kl         :math:`\frac{g_h}{g_h+g_t} KL(p \| q) + \frac{g_t}{g_h+g_t} KL(q \| p)`, g the distance
                        :math:`\sum |p-q|` on the teacher's head and tail, held constant (both 0: halves); the head is
                        the top token and every token whose cumulative mass, largest first and itself included, is at
                        most alpha, equal logits by ascending id (AKL, Wu et al., COLING 2025)
    interpolated        :math:`KL(p_t \| q),\; p_t = \mathrm{softmax}(((1-t) z^{student} + t z^{teacher})/T)` held
                        constant, t = alpha; 0 at t = 0, forward_kl at 1 (TAID, Shing et al., ICLR 2025)
    ==================  ====================================================================================

    Values are in nats, true divergences (0 when p = q), and carry no :math:`T^2` factor. Positions are taken as
    aligned: no label is shifted here. The gradient flows to ``student_logits`` alone. Logits of -inf are legal
    (probability 0, gradient 0). A position whose divergence is infinite has loss inf and gradient 0, and so it is with
    the cross-entropy of a label whose logit is -inf; one whose logits hold a NaN or are all -inf has loss and gradient
    NaN, and no other position is touched.

    Args:
        student_logits: [..., V], float32, bfloat16 or float16 (float64 on the CPU); other strides than 1 along V, and
            more than three dimensions that do not flatten to equally spaced rows, cost a copy. ``logits[:, :-1]`` is
            read where it is.
        teacher: teacher logits [..., Vt] of the same positions and device; the dtype may differ. Entries that only one
            side has count as probability 0 on the other. Or `CompressedLogits` of the same positions.
        labels: [...], integer. Positions equal to ``ignore_index`` are not read and contribute exactly 0, NaN or not.
        divergence: a name of the table.
        alpha: skew_kl, skew_reverse_kl: weight of the first argument of KL in the mixture, in [0, 1], None: 0.1; 0
            gives forward_kl and reverse_kl. alpha_beta: a >= 1e-4, None: 0.2. adaptive_kl: mass of the head in [0, 1],
            None: 0.5. interpolated: the teacher's share t in [0, 1], required. A float, or a tensor: [...] per
            position, or [] for all, which `torch.compile` does not take for a constant as it does a float.
        beta: symmetric_kl: weight of the reverse KL in [0, 1], None: 0.9; generalized_js: weight of the teacher in
            [0, 1], None: 0.5; alpha_beta: b >= 1e-4, None: 0.7.
        temperature: T > 0, for both sides.
        weight: [...], weight of each position in the sum and in the mean.
        cap: per-position upper bound, a float or a tensor, [...] or []; a capped divergence has gradient 0.
        ignore_index: label of positions to leave out.
        reduction: "mean" (sum / total weight of valid positions, or / ``num_items``), "sum", or "none" ([...]).
        ce_weight: adds ``ce_weight`` times the cross-entropy with ``labels`` at T = 1, same weights and normaliser.
        detach_mixture: hold the mixture of skew_reverse_kl constant in the gradient (as DistiLLM-2's code does).
        tail: how the entries count that a compressed teacher did not keep. "bucket": as one entry on either side, the
            exact divergence of the coarsened distributions. "truncate": the teacher's probability there is taken as 0
            (and those entries are left out of reverse_kl, which would be infinite). "renormalize": not at all, both
            sides are distributions over the kept entries. "sampled": unbiased estimates from draws (method "sample").
            Divergences of a compressed teacher: forward_kl, reverse_kl, skew_kl, skew_reverse_kl, generalized_js,
            total_variation, at a temperature that was captured; "sampled" at 1, without reverse_kl and generalized_js.
        num_items: divisor of "mean", an int or a tensor: the token count of the whole accumulated, distributed batch.
        vocab_size: use only the first ``vocab_size`` entries of both sides; what a compressed teacher did not keep
            counts as lying among them.
        inplace: write the gradient over ``student_logits``, so that no memory beyond the two inputs is needed. They
            must be computed from something that requires a gradient (not a leaf), and hold the gradient afterwards:
            whoever needs their values comes first. Eager mode only, one backward pass. Where gradients are disabled
            nothing is overwritten.
        return_metrics: also return `DivergenceMetrics`, from the same pass.

    Returns:
        Scalar, or [...] for reduction "none"; float32 (float64 for float64 logits). With ``return_metrics`` a pair of
        that and the metrics.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device, name or range. Bad values inside tensors
            (alpha > 1, a NaN weight, a label outside the vocabulary) make their own position NaN instead, since looking
            at them would synchronise with the device.

    Example:
        >>> student_logits = torch.randn(2, 8, 32000, requires_grad=True)
        >>> teacher_logits = torch.randn(2, 8, 32000)
        >>> labels = torch.randint(32000, (2, 8))
        >>> loss = distillation_loss(student_logits, teacher_logits, labels, divergence="skew_kl", alpha=0.1)
        >>> loss.backward()
    """
    check_logits(student_logits, student_logits if isinstance(teacher, CompressedLogits) else teacher)
    check_tail(tail, compressed=isinstance(teacher, CompressedLogits))
    options = checked_options(divergence, alpha, beta, temperature, ce_weight, ignore_index, detach_mixture)
    check_powers(options, alpha, student_logits.dtype)
    if ce_weight != 0 and labels is None:
        raise ValueError("ce_weight needs labels: pass labels of the positions or set ce_weight=0.")
    teacher_rows = _checked_teacher(student_logits, teacher, options, tail, vocab_size, return_metrics)
    inplace = inplace and torch.is_grad_enabled()
    if inplace:
        check_inplace(student_logits, teacher)
    shape = student_logits.shape[:-1]
    rows = SideRows(student_logits, loss_dtype(student_logits.dtype))
    flat_labels, flat_weight = rows(labels, "labels", integer=True), rows(weight, "weight")
    row_weight, deferred = deferred_weight(
        weight_of_rows(flat_weight, flat_labels, shape, student_logits, reduction, num_items, ignore_index),
        student_logits.dtype,
    )
    sides = RowSides(
        flat_labels,
        row_weight,
        rows(alpha if isinstance(alpha, Tensor) else None, "alpha"),
        rows(cap_tensor(cap, student_logits), "cap"),
    )
    request = _Request(vocab_size or 0, inplace, return_metrics)
    row_losses, metrics = _row_losses(student_logits, teacher_rows, sides, options, request)
    row_losses = row_losses if deferred is None else row_losses * deferred
    loss = row_losses.reshape(shape) if reduction == "none" else row_losses.sum()
    return (loss, DivergenceMetrics.from_rows(metrics, shape)) if return_metrics else loss


def _as_rows(logits: Tensor) -> Tensor:
    """[..., V] as the operators take it, [R, V] or [B, S, V]; with up to three dimensions whatever the strides."""
    return logits.unsqueeze(0) if logits.dim() == 1 else logits if logits.dim() <= 3 else logits.flatten(0, -3)


def _checked_teacher(
    student: Tensor,
    teacher: Tensor | CompressedLogits,
    options: DivergenceOptions,
    tail: str,
    vocab_size: int | None,
    return_metrics: bool,
) -> Tensor | CompressedRows:
    """The teacher as its operator takes it, once its vocabulary is known to fit."""
    if isinstance(teacher, CompressedLogits):
        if return_metrics:
            raise ValueError(
                "return_metrics needs the teacher's logits; CompressedLogits do not determine its entropy."
            )
        return checked_compressed(
            teacher, options, tail, student.shape[:-1], student.shape[-1], vocab_size, student.dtype, student.device
        )
    if vocab_size is not None:
        check_vocab_size(vocab_size, min(student.shape[-1], teacher.shape[-1]))
    else:
        check_vocabularies(options, student.shape[-1], teacher.shape[-1])
    return _as_rows(teacher.detach())


def _row_losses(
    student: Tensor, teacher: Tensor | CompressedRows, sides: RowSides, options: DivergenceOptions, request: _Request
) -> tuple[Tensor, Tensor]:
    """Losses [R] and metrics [R, 3] (or [0]): the one place where the kind of teacher matters."""
    rows = _as_rows(student)
    if isinstance(teacher, CompressedRows):
        loss = sparse_divergence(rows, teacher, sides, options, vocab_size=request.vocab_size, inplace=request.inplace)
        return loss, loss.new_empty(0)
    operator = divergence_inplace if request.inplace else divergence_op
    return operator(rows, teacher, *sides, options, vocab_size=request.vocab_size, need_metrics=request.metrics)


def forward_kl_loss(student_logits: Tensor, teacher: Tensor, labels: Tensor | None = None, **options) -> Tensor:
    """`distillation_loss` with divergence="forward_kl": sum p log(p/q)."""
    return distillation_loss(student_logits, teacher, labels, divergence="forward_kl", **options)


def reverse_kl_loss(student_logits: Tensor, teacher: Tensor, labels: Tensor | None = None, **options) -> Tensor:
    """`distillation_loss` with divergence="reverse_kl": sum q log(q/p)."""
    return distillation_loss(student_logits, teacher, labels, divergence="reverse_kl", **options)


def skew_kl_loss(student_logits: Tensor, teacher: Tensor, labels: Tensor | None = None, **options) -> Tensor:
    """`distillation_loss` with divergence="skew_kl": sum p log(p/m), m = alpha p + (1 - alpha) q."""
    return distillation_loss(student_logits, teacher, labels, divergence="skew_kl", **options)


def skew_reverse_kl_loss(student_logits: Tensor, teacher: Tensor, labels: Tensor | None = None, **options) -> Tensor:
    """`distillation_loss` with divergence="skew_reverse_kl": sum q log(q/m), m = (1 - alpha) p + alpha q."""
    return distillation_loss(student_logits, teacher, labels, divergence="skew_reverse_kl", **options)


def generalized_js_loss(student_logits: Tensor, teacher: Tensor, labels: Tensor | None = None, **options) -> Tensor:
    """`distillation_loss` with divergence="generalized_js": beta KL(p|m) + (1 - beta) KL(q|m)."""
    return distillation_loss(student_logits, teacher, labels, divergence="generalized_js", **options)


def total_variation_loss(student_logits: Tensor, teacher: Tensor, labels: Tensor | None = None, **options) -> Tensor:
    """`distillation_loss` with divergence="total_variation": sum |p - q| / 2."""
    return distillation_loss(student_logits, teacher, labels, divergence="total_variation", **options)


def alpha_beta_loss(student_logits: Tensor, teacher: Tensor, labels: Tensor | None = None, **options) -> Tensor:
    """`distillation_loss` with divergence="alpha_beta", a = alpha, b = beta."""
    return distillation_loss(student_logits, teacher, labels, divergence="alpha_beta", **options)
