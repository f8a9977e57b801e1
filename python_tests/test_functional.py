"""Arguments of `distillation_loss`: a bad one is named, with what was expected and what came, before a kernel runs."""

import pytest
import torch

import distillm_ext
from distillm_ext import DIVERGENCES, distillation_loss, functional, losses

STUDENT, TEACHER = torch.randn(4, 10), torch.randn(4, 10)
LABELS = torch.tensor([1, 2, 3, -100])

BAD = {
    "student_logits type": (TypeError, "student_logits must be a tensor", dict(student_logits=[1.0])),
    "student_logits dtype": (TypeError, "student_logits must be float32", dict(student_logits=STUDENT.long())),
    "student_logits shape": (ValueError, r"student_logits must have shape", dict(student_logits=torch.zeros(4, 0))),
    "scalar student_logits": (ValueError, r"student_logits must have shape", dict(student_logits=torch.zeros(()))),
    "teacher type": (TypeError, "teacher must be a tensor", dict(teacher=None)),
    "teacher shape": (
        ValueError,
        r"teacher must have the positions.*\[4\], got \[5\]",
        dict(teacher=torch.zeros(5, 10)),
    ),
    "teacher device": (ValueError, "teacher must be on the device", dict(teacher=TEACHER.to("meta"))),
    "float64 on one side": (TypeError, "float64 logits need float64 on both sides", dict(teacher=TEACHER.double())),
    "labels shape": (ValueError, "labels must have one entry per position", dict(labels=torch.zeros(4, 1).long())),
    "labels dtype": (TypeError, "labels must be an integer tensor", dict(labels=torch.zeros(4))),
    "labels type": (TypeError, "labels must be a tensor", dict(labels=[1, 2, 3, 4])),
    "divergence": (ValueError, "divergence must be one of .*skew_kl.*'kl'", dict(divergence="kl")),
    "alpha range": (ValueError, r"alpha must lie in \[0, 1\], got 1.5", dict(alpha=1.5)),
    "alpha NaN": (ValueError, "alpha must lie in", dict(alpha=float("nan"))),
    "alpha type": (TypeError, "alpha must be a number", dict(alpha="0.1")),
    "alpha shape": (ValueError, "alpha must have one entry per position", dict(alpha=torch.ones(3))),
    "alpha without use": (ValueError, "alpha has no meaning for forward_kl", dict(divergence="forward_kl", alpha=0.1)),
    "beta range": (ValueError, r"beta must lie in \[0, 1\], got 2", dict(divergence="generalized_js", beta=2)),
    "beta without use": (ValueError, "beta has no meaning for skew_kl", dict(beta=0.5)),
    "tensor alpha without use": (
        ValueError,
        "alpha has no meaning",
        dict(divergence="reverse_kl", alpha=torch.ones(4)),
    ),
    "alpha_beta": (ValueError, "alpha_beta needs alpha > 0 and beta > 0", dict(divergence="alpha_beta", alpha=0.0)),
    "temperature": (ValueError, "temperature must be positive", dict(temperature=0.0)),
    "temperature infinite": (ValueError, "temperature must be positive", dict(temperature=float("inf"))),
    "temperature type": (TypeError, "temperature must be a number", dict(temperature=torch.ones(()))),
    "weight shape": (ValueError, "weight must have one entry per position", dict(weight=torch.ones(1))),
    "weight complex": (TypeError, "weight must be real", dict(weight=torch.ones(4, dtype=torch.complex64))),
    "cap": (ValueError, "cap must not be negative", dict(cap=-1.0)),
    "cap shape": (ValueError, "cap must have one entry per position", dict(cap=torch.ones(2))),
    "reduction": (ValueError, "reduction must be 'mean', 'sum' or 'none', got 'avg'", dict(reduction="avg")),
    "num_items negative": (ValueError, "num_items must be finite and not negative", dict(num_items=-3)),
    "num_items shape": (ValueError, "num_items must have one element", dict(num_items=torch.ones(2))),
    "num_items without mean": (ValueError, "num_items is the divisor of", dict(num_items=3, reduction="sum")),
    "ce_weight": (ValueError, "ce_weight must be finite and not negative", dict(ce_weight=-1.0)),
    "ce_weight without labels": (ValueError, "ce_weight needs labels", dict(ce_weight=1.0)),
    "detach_mixture": (ValueError, "detach_mixture is an option of skew_reverse_kl", dict(detach_mixture=True)),
    "ignore_index": (TypeError, "ignore_index must be an int", dict(ignore_index=1.5)),
    "alpha of interpolated": (ValueError, "interpolated needs alpha", dict(divergence="interpolated")),
    "alpha of adaptive_kl": (ValueError, r"alpha must lie in \[0, 1\]", dict(divergence="adaptive_kl", alpha=1.5)),
    "tail": (ValueError, "tail must be one of bucket, .*got 'rest'", dict(tail="rest")),
    "tail without use": (ValueError, "tail is an option of a CompressedLogits teacher", dict(tail="truncate")),
    "inplace without gradient": (ValueError, "do not require a gradient", dict(inplace=True)),
    "vocab_size range": (ValueError, "vocab_size must lie in 1..10", dict(vocab_size=11)),
    "vocab_size type": (TypeError, "vocab_size must be an int", dict(vocab_size=5.0)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    error, message, changed = BAD[case]
    arguments = {"student_logits": STUDENT, "teacher": TEACHER, **changed}
    with pytest.raises(error, match=message):
        distillation_loss(**arguments)


def test_named_forms_and_modules_are_the_same_function():
    for name in DIVERGENCES:
        options = dict(temperature=2.0, **({"alpha": 0.4} if name == "interpolated" else {}))
        expected = distillation_loss(STUDENT, TEACHER, LABELS, divergence=name, **options)
        form = getattr(distillm_ext, f"{name}_loss", None)
        if form is not None:
            torch.testing.assert_close(form(STUDENT, TEACHER, LABELS, **options), expected)
        module = losses.DistillationLoss(name, **options)
        torch.testing.assert_close(module(STUDENT, TEACHER, LABELS), expected)
    for module_class, name in (
        (losses.ForwardKLLoss, "forward_kl"),
        (losses.ReverseKLLoss, "reverse_kl"),
        (losses.SkewKLLoss, "skew_kl"),
        (losses.SkewReverseKLLoss, "skew_reverse_kl"),
        (losses.GeneralizedJSLoss, "generalized_js"),
        (losses.TotalVariationLoss, "total_variation"),
        (losses.AlphaBetaLoss, "alpha_beta"),
        (losses.AdaptiveKLLoss, "adaptive_kl"),
    ):
        module = module_class(temperature=2.0)
        expected = distillation_loss(STUDENT, TEACHER, LABELS, divergence=name, temperature=2.0)
        torch.testing.assert_close(module(STUDENT, TEACHER, LABELS), expected)
        assert f"divergence='{name}'" in repr(module) and not list(module.parameters())


def test_module_passes_weight_and_num_items():
    module = losses.SkewKLLoss(alpha=0.3, ce_weight=0.5)
    weight = torch.rand(4)
    expected = distillation_loss(STUDENT, TEACHER, LABELS, alpha=0.3, ce_weight=0.5, weight=weight, num_items=7)
    torch.testing.assert_close(module(STUDENT, TEACHER, LABELS, weight=weight, num_items=7), expected)


def test_default_divergence_is_skew_kl_with_alpha_a_tenth():
    torch.testing.assert_close(
        distillation_loss(STUDENT, TEACHER), functional.skew_kl_loss(STUDENT, TEACHER, alpha=0.1)
    )


def test_integer_labels_of_any_width():
    expected = distillation_loss(STUDENT, TEACHER, LABELS, ce_weight=1.0)
    for dtype in (torch.int32, torch.int16):
        torch.testing.assert_close(distillation_loss(STUDENT, TEACHER, LABELS.to(dtype), ce_weight=1.0), expected)
