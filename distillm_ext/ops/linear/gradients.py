"""Gradients of `linear_divergence`, collected chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..divergence import loss_dtype
from .call import LinearDivergenceCall

# Vocabulary entries whose part of a weight gradient is formed at once where it has to be converted.
_TILE = 4096

# acc [v, H] (+)= scale * gradient [n, v]^T hidden [n, H], the product formed in float32 from narrower factors.
Accumulate = Callable[[Tensor, Tensor, Tensor, float, bool], None]


def accumulate_cpu(acc: Tensor, gradient: Tensor, hidden: Tensor, scale: float, first: bool) -> None:
    # No product of narrow matrices on the CPU has a float32 result: the factors are converted.
    acc.addmm_(gradient.t().to(acc.dtype), hidden.to(acc.dtype), beta=0 if first else 1, alpha=scale)


def accumulate_cuda(acc: Tensor, gradient: Tensor, hidden: Tensor, scale: float, first: bool) -> None:
    product = torch.mm(gradient.t(), hidden, out_dtype=acc.dtype)
    if first:
        torch.mul(product, scale, out=acc)
    else:
        acc.add_(product, alpha=scale)


class Gradients:
    """Gradients of one call, for the rows that count; weight and bias accumulate in float32 (float64 for float64)."""

    def __init__(self, call: LinearDivergenceCall, original: LinearDivergenceCall, accumulate: Accumulate) -> None:
        self.call, self.original, self.accumulate = call, original, accumulate
        self.needed = not call.per_row and (call.need_hidden or call.need_weight or call.need_bias)
        head, whole = call.student, original.student.weight.shape
        self.hidden, self.weight, self.bias = (head.hidden.new_empty(0) for _ in range(3))
        if not self.needed:
            return
        wide = loss_dtype(call.dtype)
        if call.need_hidden:
            self.hidden = torch.empty_like(head.hidden, memory_format=torch.contiguous_format)
        if call.need_weight:
            # The first chunk writes what it covers.
            covered = head.hidden.shape[0] > 0 and head.weight.shape[0] == whole[0]
            make = head.weight.new_empty if covered else head.weight.new_zeros
            self.weight = make(whole, dtype=wide)
        if call.need_bias:
            self.bias = head.weight.new_zeros(whole[0], dtype=wide)

    def add(self, part: slice, gradient: Tensor) -> None:
        """Takes the gradient [n, V] of the logits of rows `part`."""
        call, head, vocab = self.call, self.call.student, gradient.shape[1]
        if call.need_hidden:
            self.hidden[part].addmm_(gradient, head.weight, beta=0, alpha=head.scale)
        if call.need_bias:
            self.bias[:vocab].add_(gradient.sum(0, dtype=self.bias.dtype), alpha=head.scale)
        if not call.need_weight:
            return
        hidden, first = head.hidden[part], part.start == 0
        if self.weight.dtype == gradient.dtype:
            self.weight[:vocab].addmm_(gradient.t(), hidden, beta=0 if first else 1, alpha=head.scale)
            return
        for begin in range(0, vocab, _TILE):
            tile = slice(begin, min(begin + _TILE, vocab))
            self.accumulate(self.weight[tile], gradient[:, tile], hidden, head.scale, first)

    def result(self, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """In the shapes of hidden, weight and bias, [0] where not needed, and their dtypes but for `stored_dtype`."""
        hidden, weight, bias = self.original.student[:3]
        bias_dtype = weight.dtype if bias is None else bias.dtype
        found = self.hidden.to(hidden.dtype)
        if self.needed and self.call.need_hidden:
            found = spread(found, rows, hidden.shape[0])
        return found, self.weight.to(stored_dtype(weight.dtype)), self.bias.to(stored_dtype(bias_dtype))


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which gradients of weight and bias wait for the backward pass: sums over rows may leave the range of float16
    before they are multiplied by the rows' common weight (`common_weight`)."""
    return torch.float32 if dtype == torch.float16 else dtype


def common_weight(row_weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The largest row weight, where the others should be relative to it: beside float16 products.

    Their gradients would have no digits left after the division of "mean"; so the factor that all rows share waits for
    the backward pass, which applies it in float32 together with that of a gradient scaler.
    """
    if dtype != torch.float16 or row_weight.numel() == 0:
        return None
    largest = row_weight.nan_to_num(0.0, 0.0, 0.0).abs().amax()
    return torch.where(largest == 0, torch.ones_like(largest), largest)


def spread(values: Tensor, rows: Tensor | None, total: int) -> Tensor:
    """The values of the rows that count among all rows, 0 elsewhere."""
    if rows is None:
        return values
    return values.new_zeros((total, *values.shape[1:])).index_copy_(0, rows, values)
