"""Operands of `few_rows_linear` and the bound on its results. Imports no transformers."""

import torch

DTYPES = [torch.float32, torch.bfloat16]


def operands(rows, columns, depth, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, depth), (columns, depth), (columns,))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def assert_exact(found, x, weight, bias):
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    scale = x.double().abs() @ weight.double().abs().t() + 1
    unit = 2**-8 if found.dtype == torch.bfloat16 else 2**-22
    assert found.dtype == x.dtype and ((found.double() - expected).abs() <= unit * scale).all()
