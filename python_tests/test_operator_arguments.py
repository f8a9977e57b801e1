"""The options of a loss on their way: from the objective to the arguments of the operators."""

import pytest
import torch
from linear_cases import ROWS, VOCAB, logits_of, make_case
from trainer_world import tiny_config

from distillm_ext import compress_logits
from distillm_ext.containers import LinearHead
from distillm_ext.ops.divergence import DivergenceOptions, RowSides
from distillm_ext.ops.linear.call import HeadRows, LinearDivergenceCall, flatten, unflatten
from distillm_ext.ops.sparse_divergence import CompressedRows
from distillm_ext.training.makers import configured_options
from distillm_ext.training.objectives import DivergenceObjective

OPTIONS = DivergenceOptions("skew_kl", 0.2, 0.3, 1.5, 0.4, 7, True)
SIDES = RowSides(torch.arange(2), torch.rand(2), torch.rand(2), torch.rand(2))
HEAD = HeadRows(torch.rand(2, 3), torch.rand(5, 3), torch.rand(5), 0.5, 30.0)
KEPT = CompressedRows(torch.zeros(2, 1, dtype=torch.int32), *torch.rand(3, 2), None, "bucket", 9)


def names(operator: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.distillm_ext, operator).default._schema.arguments]


def test_fields_stand_in_the_order_of_the_schemas():
    dense = ["student", "teacher", *RowSides._fields, *DivergenceOptions._fields, "vocab_size"]
    assert names("divergence") == [*dense, "need_gradient", "need_metrics"]
    assert names("divergence_") == [*dense, "need_metrics"]
    *tensors, tail, _ = CompressedRows._fields
    divergence, *scalars = DivergenceOptions._fields
    sparse = ["student", *tensors, *RowSides._fields, divergence, tail, *scalars, "vocab_size", "teacher_vocab"]
    assert names("sparse_divergence") == [*sparse, "need_gradient"]
    assert names("sparse_divergence_") == sparse


@pytest.mark.parametrize("teacher", (HEAD, KEPT, torch.rand(2, 5), None))
@pytest.mark.parametrize("student", (HEAD, HEAD._replace(bias=None)))
def test_a_call_survives_the_schema(student, teacher):
    flags = (torch.float32, 4, 5, True, False, True, False, True, False)
    call = LinearDivergenceCall(student, teacher, SIDES, OPTIONS, torch.arange(2), *flags)
    found = dict(zip(names("linear_divergence"), flatten(call), strict=True))
    assert unflatten(tuple(found.values())) == call
    expected = {
        **{f"student_{name}": value for name, value in student._asdict().items()},
        **SIDES._asdict(), **OPTIONS._asdict(), "rows": call.rows, "chunk_rows": 4, "need_bias": False,
        "teacher_logits": teacher if isinstance(teacher, torch.Tensor) else None,
    }  # fmt: skip
    for kind in (HEAD, KEPT):
        expected |= {f"teacher_{name}": x if teacher is kind else None for name, x in kind._asdict().items()}
    assert all(found[name] is value for name, value in expected.items())


@pytest.mark.parametrize("compressed", (True, False))
@pytest.mark.parametrize("fused", (True, False))
def test_the_objective_s_options_arrive_as_they_are(fused, compressed, monkeypatch):
    """One object, made and checked once; without cross-entropy where the targets are no truth to fit."""
    seen, objective = [], DivergenceObjective(DivergenceOptions("skew_kl", alpha=0.2, ce_weight=0.5))
    losses, metrics = torch.zeros(ROWS), torch.zeros(ROWS, 3)

    def operator(student, teacher, sides, options, **_):
        seen.append(options)
        return losses, metrics

    def linear_operator(call):
        seen.append(call.options)
        return losses.sum(), losses.sum(), metrics

    monkeypatch.setattr("distillm_ext.functional.row_losses", operator)
    monkeypatch.setattr("distillm_ext.linear.linear_divergence", linear_operator)
    case = make_case(labels=False)
    student = LinearHead(case.hidden, case.weight, case.bias)
    teacher = compress_logits(logits_of(case.teacher), 8) if compressed else case.teacher
    for truth in (True, False):
        rows = student if fused else logits_of(student)
        objective(rows, teacher, torch.arange(ROWS) % VOCAB, num_items=ROWS, ground_truth=truth)
    assert seen[0] is objective.options and seen[1] == objective.options._replace(ce_weight=0.0) and len(seen) == 2


def test_a_configuration_s_options_are_its_fields_of_their_names(tmp_path):
    config = tiny_config(tmp_path, divergence="alpha_beta", alpha=0.3, beta=0.6, temperature=2.0, ce_weight=0.1)
    assert configured_options(config) == DivergenceOptions("alpha_beta", 0.3, 0.6, 2.0, 0.1)
    config.alpha = config.beta = None
    assert configured_options(config)[1:3] == (0.2, 0.7)  # the published defaults
    config.alpha = -1.0
    with pytest.raises(ValueError, match="alpha must be finite and not negative"):
        configured_options(config)
