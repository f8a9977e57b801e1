"""Operator `few_rows_linear`: against float64, rows independent of each other, contract."""

import pytest
import torch
from few_rows_cases import DTYPES, assert_exact, operands
from torch import nn

from distillm_ext.generation.loop.linears import MOST_ROWS, few_rows_linears
from distillm_ext.ops.few_rows_linear import few_rows_linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 13, 16])
def test_values(rows, dtype):
    for columns, depth in ((1, 1), (2, 7), (3, 8), (5, 33), (64, 576), (31, 1537)):
        x, weight, bias = operands(rows, columns, depth, dtype, seed=depth)
        assert_exact(few_rows_linear(x, weight, bias), x, weight, bias)
        assert_exact(few_rows_linear(x, weight, None), x, weight, None)


def test_a_row_does_not_depend_on_the_others():
    x, weight, bias = operands(9, 50, 577)
    together = few_rows_linear(x, weight, bias)
    for row in range(9):
        assert torch.equal(few_rows_linear(x[row : row + 1], weight, bias), together[row : row + 1])
        assert torch.equal(few_rows_linear(x[row:], weight[1:], bias[1:]), together[row:, 1:])
    x[4] = float("nan")
    spoilt = few_rows_linear(x, weight, bias)
    assert spoilt[4].isnan().all() and torch.equal(spoilt[:4], together[:4]) and torch.equal(spoilt[5:], together[5:])


def test_strided_and_empty_operands():
    x, weight, bias = operands(4, 6, 20)
    expected = few_rows_linear(x, weight, bias)
    assert torch.equal(few_rows_linear(x.t().contiguous().t(), weight.t().contiguous().t(), bias), expected)
    wide = torch.zeros(6, 2)
    wide[:, 0] = bias
    assert torch.equal(few_rows_linear(x, weight, wide[:, 0]), expected)
    assert few_rows_linear(x[:0], weight, bias).shape == (0, 6)
    assert few_rows_linear(x, weight[:0], bias[:0]).shape == (4, 0)
    assert torch.equal(few_rows_linear(x[:, :0], weight[:, :0], bias), bias.expand(4, 6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_and_compile(dtype):
    x, weight, bias = operands(3, 5, 9, dtype)
    for arguments in ((x, weight, bias), (x, weight, None)):
        torch.library.opcheck(torch.ops.distillm_ext.few_rows_linear.default, arguments)
    compiled = torch.compile(few_rows_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, bias), few_rows_linear(x, weight, bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x, w[:, 1:], b), "expects x"),
        (lambda x, w, b: (x[0], w, b), "expects x"),
        (lambda x, w, b: (x.double(), w.double(), b.double()), "weight must be float32 or bfloat16"),
        (lambda x, w, b: (x.bfloat16(), w, b), "x must have the dtype of weight"),
        (lambda x, w, b: (x, w, b[1:]), "bias must be"),
        (lambda x, w, b: (x, w, b.bfloat16()), "bias must be"),
    ],
)
def test_contract(change, message):
    with pytest.raises(RuntimeError, match=message):
        few_rows_linear(*change(*operands(2, 3, 4)))


# ---- in models


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_take_the_kernel_and_are_given_back(monkeypatch):
    calls = []
    monkeypatch.setattr("distillm_ext.generation.loop.linears.few_rows_linear",
                        lambda *a: calls.append(len(a[0])) or few_rows_linear(*a))  # fmt: skip
    model = nn.Sequential(nn.Linear(8, 8), Doubled(8, 8), nn.Linear(8, 8).double(), nn.Linear(8, 4, bias=False))
    x = torch.randn(2, 3, 8)
    with torch.no_grad(), few_rows_linears(model):
        torch.testing.assert_close(model[0](x), nn.functional.linear(x, model[0].weight, model[0].bias))
        assert model[3](x).shape == (2, 3, 4) and model[1](x).shape == x.shape and model[2](x.double()).shape == x.shape
        model[0](torch.randn(MOST_ROWS + 1, 8))
    assert calls == [6, 6]
    assert all("forward" not in vars(module) for module in model)


def test_under_autocast_layers_stay_as_they_are():
    model = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), few_rows_linears(model):
        assert "forward" not in vars(model[0]) and model(torch.randn(2, 8)).dtype == torch.bfloat16
