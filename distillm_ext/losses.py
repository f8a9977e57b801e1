"""The losses as modules that hold hyper-parameters and nothing else; mathematics and arguments: `functional`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .containers import DivergenceMetrics, TeacherHead
from .functional import distillation_loss
from .linear import linear_distillation_loss


class DistillationLoss(nn.Module):
    """Callable `distillation_loss` with fixed hyper-parameters.

    Args:
        divergence, alpha, beta, temperature, cap, ignore_index, reduction, ce_weight, detach_mixture, tail, vocab_size,
            inplace: as in `distillm_ext.distillation_loss`.

    Shape:
        student_logits [..., V], teacher logits [..., Vt], labels and weight [...] -> scalar, or [...] for "none"; with
        ``return_metrics=True`` a pair of that and `DivergenceMetrics`.

    Example:
        >>> criterion = DistillationLoss(divergence="skew_kl", alpha=0.1)
        >>> criterion(torch.randn(4, 100, requires_grad=True), torch.randn(4, 100)).backward()
    """

    def __init__(
        self,
        divergence: str = "skew_kl",
        *,
        alpha: float | None = None,
        beta: float | None = None,
        temperature: float = 1.0,
        cap: float | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        ce_weight: float = 0.0,
        detach_mixture: bool = False,
        tail: str = "bucket",
        vocab_size: int | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        self.divergence = divergence
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.cap = cap
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.ce_weight = ce_weight
        self.detach_mixture = detach_mixture
        self.tail = tail
        self.vocab_size = vocab_size
        self.inplace = inplace

    def forward(
        self,
        student_logits: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
        return_metrics: bool = False,
    ) -> Tensor | tuple[Tensor, DivergenceMetrics]:
        options: dict[str, Any] = {**self.hyper_parameters(), "return_metrics": return_metrics}
        return distillation_loss(student_logits, teacher, labels, weight=weight, num_items=num_items, **options)

    _options: tuple[str, ...] = (
        "divergence", "alpha", "beta", "temperature", "cap", "ignore_index", "reduction", "ce_weight",
        "detach_mixture", "tail", "vocab_size", "inplace",
    )  # fmt: skip

    def hyper_parameters(self) -> dict[str, Any]:
        """By name, as `distillation_loss` takes them."""
        return {name: getattr(self, name) for name in self._options}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.hyper_parameters().items())


class LinearDistillationLoss(DistillationLoss):
    """Callable `linear_distillation_loss` with fixed hyper-parameters.

    Args:
        divergence: as in `DistillationLoss`.
        logit_softcap, logit_scale, chunk_rows: as in `distillm_ext.linear_distillation_loss`.
        options: the other hyper-parameters of `DistillationLoss`, but for ``inplace``.

    Shape:
        student_hidden [..., H], student_weight [V, H], student_bias [V]; teacher a `TeacherHead` or logits [..., Vt];
        labels and weight [...]; rows [n] -> scalar, or [...] for "none".

    Example:
        >>> criterion = LinearDistillationLoss(divergence="skew_kl", alpha=0.1)
        >>> head = torch.nn.Linear(16, 100, bias=False)
        >>> criterion(torch.randn(4, 16), head.weight, TeacherHead(torch.randn(4, 32), torch.randn(100, 32))).backward()
    """

    # There are no logits to overwrite.
    _options = (*DistillationLoss._options[:-1], "logit_softcap", "logit_scale", "chunk_rows")

    def __init__(
        self,
        divergence: str = "skew_kl",
        *,
        logit_softcap: float | None = None,
        logit_scale: float = 1.0,
        chunk_rows: int | None = None,
        **options: Any,
    ) -> None:
        if "inplace" in options:
            raise TypeError("inplace is no option of LinearDistillationLoss: there are no logits to overwrite.")
        super().__init__(divergence, **options)
        self.logit_softcap = logit_softcap
        self.logit_scale = logit_scale
        self.chunk_rows = chunk_rows

    def forward(  # type: ignore[override]
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher: TeacherHead | Tensor,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        weight: Tensor | None = None,
        rows: Tensor | None = None,
        num_items: int | Tensor | None = None,
        return_metrics: bool = False,
    ) -> Tensor | tuple[Tensor, DivergenceMetrics]:
        options: dict[str, Any] = {**self.hyper_parameters(), "return_metrics": return_metrics}
        return linear_distillation_loss(
            student_hidden, student_weight, teacher, labels, student_bias=student_bias, weight=weight, rows=rows,
            num_items=num_items, **options,
        )  # fmt: skip


class ForwardKLLoss(DistillationLoss):
    """`DistillationLoss` with divergence="forward_kl"."""

    def __init__(self, **options) -> None:
        super().__init__("forward_kl", **options)


class ReverseKLLoss(DistillationLoss):
    """`DistillationLoss` with divergence="reverse_kl"."""

    def __init__(self, **options) -> None:
        super().__init__("reverse_kl", **options)


class SkewKLLoss(DistillationLoss):
    """`DistillationLoss` with divergence="skew_kl"."""

    def __init__(self, alpha: float = 0.1, **options) -> None:
        super().__init__("skew_kl", alpha=alpha, **options)


class SkewReverseKLLoss(DistillationLoss):
    """`DistillationLoss` with divergence="skew_reverse_kl"."""

    def __init__(self, alpha: float = 0.1, **options) -> None:
        super().__init__("skew_reverse_kl", alpha=alpha, **options)


class GeneralizedJSLoss(DistillationLoss):
    """`DistillationLoss` with divergence="generalized_js"."""

    def __init__(self, beta: float = 0.5, **options) -> None:
        super().__init__("generalized_js", beta=beta, **options)


class TotalVariationLoss(DistillationLoss):
    """`DistillationLoss` with divergence="total_variation"."""

    def __init__(self, **options) -> None:
        super().__init__("total_variation", **options)


class AlphaBetaLoss(DistillationLoss):
    """`DistillationLoss` with divergence="alpha_beta"."""

    def __init__(self, alpha: float = 0.2, beta: float = 0.7, **options) -> None:
        super().__init__("alpha_beta", alpha=alpha, beta=beta, **options)


class AdaptiveKLLoss(DistillationLoss):
    """`DistillationLoss` with divergence="adaptive_kl"; alpha is the mass of the teacher's head."""

    def __init__(self, alpha: float = 0.5, **options) -> None:
        super().__init__("adaptive_kl", alpha=alpha, **options)
