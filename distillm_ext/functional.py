"""Distillation losses: the stateless public API.

Checks arguments once, flattens positions to rows, turns masks and reduction into row weights, calls the operator.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .containers import CompressedLogits
from .ops.divergence import DivergenceOptions, loss_dtype
from .ops.divergence import divergence as divergence_op
from .ops.extension import require_backend
from .ops.sparse_divergence import sparse_divergence as sparse_divergence_op
from .options import DIVERGENCES as DIVERGENCES
from .options import checked_number, checked_options
from .sparse import check_tail, compressed_rows

_LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def distillation_loss(
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
) -> Tensor:
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
    ==================  ====================================================================================

    Values are in nats, true divergences (0 when p = q), and carry no :math:`T^2` factor. Positions are taken as
    aligned: no label is shifted here. The gradient flows to ``student_logits`` alone. Logits of -inf are legal
    (probability 0, gradient 0). A position whose divergence is infinite has loss inf and gradient 0; one whose logits
    hold a NaN or are all -inf has loss and gradient NaN, and no other position is touched.

    Args:
        student_logits: [..., V], float32, bfloat16 or float16 (float64 on the CPU); other strides than 1 along V, and
            positions that do not flatten to equally spaced rows, cost a copy.
        teacher: teacher logits [..., Vt] of the same positions and device; the dtype may differ. Entries that only one
            side has count as probability 0 on the other. Or `CompressedLogits` of the same positions, of which
            ``tail`` says how the entries count that were not kept.
        labels: [...], integer. Positions equal to ``ignore_index`` are not read and contribute exactly 0, NaN or not.
        divergence: a name of the table.
        alpha: skew_kl, skew_reverse_kl: weight of the first argument of KL in the mixture, in [0, 1], None: 0.1; 0
            gives forward_kl and reverse_kl. alpha_beta: a > 0, None: 0.2. A float, or a tensor [...] per position.
        beta: symmetric_kl: weight of the reverse KL in [0, 1], None: 0.9; generalized_js: weight of the teacher in
            [0, 1], None: 0.5; alpha_beta: b > 0, None: 0.7.
        temperature: T > 0, for both sides.
        weight: [...], weight of each position in the sum and in the mean.
        cap: per-position upper bound, a float or a tensor [...]; a capped divergence has gradient 0.
        ignore_index: label of positions to leave out.
        reduction: "mean" (sum / total weight of valid positions, or / ``num_items``), "sum", or "none" ([...]).
        ce_weight: adds ``ce_weight`` times the cross-entropy with ``labels`` at T = 1, same weights and normaliser.
        detach_mixture: hold the mixture of skew_reverse_kl constant in the gradient (as DistiLLM-2's code does).
        tail: of a compressed teacher: "bucket" joins all entries that were not kept to one, on both sides, which gives
            the exact divergence of the coarsened distributions; "truncate" takes the teacher's probability there as 0
            (and leaves those entries out of reverse_kl, which would be infinite); "renormalize" looks at the kept
            entries alone; "sampled" is the unbiased estimate from draws (method "sample", at T = 1: forward_kl,
            skew_kl, skew_reverse_kl, total_variation). Divergences from a compressed teacher: those four, reverse_kl
            and generalized_js, at a captured temperature.
        num_items: divisor of "mean", an int or a tensor: the token count of the whole accumulated, distributed batch.
        vocab_size: use only the first ``vocab_size`` entries of both sides.

    Returns:
        Scalar, or [...] for reduction "none"; float32 (float64 for float64 logits).

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
    compressed = isinstance(teacher, CompressedLogits)
    _check_logits(student_logits, student_logits if compressed else teacher)
    check_tail(tail)
    shape = student_logits.shape[:-1]
    options = checked_options(divergence, alpha, beta, temperature, ce_weight, ignore_index, detach_mixture)
    if ce_weight != 0 and labels is None:
        raise ValueError("ce_weight needs labels: pass labels of the positions or set ce_weight=0.")
    if compressed:
        teacher_rows = compressed_rows(
            teacher, options, tail, shape, student_logits.shape[-1], vocab_size, student_logits.dtype,
            student_logits.device,
        )  # fmt: skip
        student_logits = student_logits[..., :vocab_size]
    else:
        if vocab_size is not None:
            student_logits, teacher = _cut(student_logits, teacher, vocab_size)
        _check_vocabularies(options, student_logits.shape[-1], teacher.shape[-1])
        teacher_rows = teacher.detach().reshape(-1, teacher.shape[-1])
    dtype = loss_dtype(student_logits.dtype)
    rows = _rows_of(student_logits, dtype)
    flat_labels = rows(labels, "labels", integer=True)
    flat_weight = rows(weight, "weight")
    row_weight = _row_weight(flat_weight, flat_labels, shape, student_logits, reduction, num_items, ignore_index)
    loss = (sparse_divergence_op if compressed else divergence_op)(
        student_logits.reshape(-1, student_logits.shape[-1]),
        teacher_rows,
        flat_labels,
        row_weight,
        rows(alpha if isinstance(alpha, Tensor) else None, "alpha"),
        rows(_cap_tensor(cap, student_logits), "cap"),
        options,
    )
    return loss.reshape(shape) if reduction == "none" else loss.sum()


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    for name, logits in (("student_logits", student), ("teacher", teacher)):
        if not isinstance(logits, Tensor):
            raise TypeError(f"{name} must be a tensor of logits, got {type(logits).__name__}.")
        if logits.dtype not in _LOGIT_DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}.")
        if logits.dim() < 1 or logits.shape[-1] == 0:
            raise ValueError(f"{name} must have shape [..., V] with V >= 1, got {list(logits.shape)}.")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher must have the positions of student_logits, {list(student.shape[:-1])}, got "
            f"{list(teacher.shape[:-1])}; select or pad the same tokens on both sides."
        )
    if student.device != teacher.device:
        raise ValueError(f"teacher must be on the device of student_logits, {student.device}, got {teacher.device}.")
    if (student.dtype == torch.float64) != (teacher.dtype == torch.float64):
        raise TypeError(f"float64 logits need float64 on both sides, got {student.dtype} and {teacher.dtype}.")
    if student.dtype == torch.float64 and student.device.type == "cuda":
        raise TypeError("student_logits must be float32, bfloat16 or float16 on CUDA; float64 is for the CPU.")
    require_backend(student.device)


def _cut(student: Tensor, teacher: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    narrower = min(student.shape[-1], teacher.shape[-1])
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}.")
    if not 1 <= vocab_size <= narrower:
        raise ValueError(f"vocab_size must lie in 1..{narrower}, the narrower vocabulary, got {vocab_size}.")
    return student[..., :vocab_size], teacher[..., :vocab_size]


def _check_vocabularies(options: DivergenceOptions, student: int, teacher: int) -> None:
    """Refuses what would be infinite at every position."""
    zero_alpha = options.alpha == 0
    both = options.divergence in ("symmetric_kl", "token_adaptive")
    forward = both or options.divergence == "forward_kl" or (options.divergence == "skew_kl" and zero_alpha)
    reverse = both or options.divergence == "reverse_kl" or (options.divergence == "skew_reverse_kl" and zero_alpha)
    if (forward and teacher > student) or (reverse and student > teacher):
        wider = "teacher" if teacher > student else "student_logits"
        raise ValueError(
            f"{options.divergence} is infinite when {wider} has entries that the other side lacks ({student} student, "
            f"{teacher} teacher entries); pass vocab_size={min(student, teacher)} to use the entries that both have."
        )


class _rows_of:
    """Flattens a side input [...] to contiguous rows of the right dtype, with checks."""

    def __init__(self, logits: Tensor, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = logits.shape[:-1], logits.device, dtype

    def __call__(self, value: Tensor | None, name: str, integer: bool = False) -> Tensor | None:
        if value is None:
            return None
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}.")
        if value.shape != self.shape:
            raise ValueError(f"{name} must have one entry per position, {list(self.shape)}, got {list(value.shape)}.")
        if value.device != self.device:
            raise ValueError(f"{name} must be on the device of student_logits, {self.device}, got {value.device}.")
        if integer and (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool):
            raise TypeError(f"{name} must be an integer tensor, got {value.dtype}.")
        if value.is_complex():
            raise TypeError(f"{name} must be real, got {value.dtype}.")
        return value.detach().reshape(-1).to(torch.int64 if integer else self.dtype)


def _cap_tensor(cap: float | Tensor | None, logits: Tensor) -> Tensor | None:
    if cap is None or isinstance(cap, Tensor):
        return cap
    cap = checked_number(cap, "cap")
    if not cap >= 0:
        raise ValueError(f"cap must not be negative, got {cap}.")
    return torch.full(logits.shape[:-1], cap, dtype=loss_dtype(logits.dtype), device=logits.device)


def _row_weight(
    weight: Tensor | None,
    labels: Tensor | None,
    shape: torch.Size,
    logits: Tensor,
    reduction: str,
    num_items: int | Tensor | None,
    ignore_index: int,
) -> Tensor | None:
    """The factor of every row, the division of "mean" included: the kernel's gradient is then final."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
    if reduction != "mean":
        if num_items is not None:
            raise ValueError(f"num_items is the divisor of reduction='mean', got reduction={reduction!r}.")
        return weight
    if weight is None:
        weight = torch.ones(shape.numel(), dtype=loss_dtype(logits.dtype), device=logits.device)
    if num_items is not None:
        total = _checked_num_items(num_items, weight)
    else:
        # A NaN weight spoils its own row only, so it stays out of the divisor.
        counted = weight.nan_to_num(nan=0.0)
        total = (counted if labels is None else counted * (labels != ignore_index)).sum()
    return weight * torch.where(total == 0, torch.zeros_like(total), 1 / total)


def _checked_num_items(num_items: int | Tensor, weight: Tensor) -> Tensor:
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must have one element, got shape {list(num_items.shape)}.")
        return num_items.detach().reshape(()).to(weight)
    count = checked_number(num_items, "num_items")
    if not 0.0 <= count < math.inf:
        raise ValueError(f"num_items must be finite and not negative, got {num_items}.")
    return torch.full((), count, dtype=weight.dtype, device=weight.device)


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
