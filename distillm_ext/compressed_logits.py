"""`CompressedLogits`: what is kept of a teacher's logits. Data only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # noqa: PLC2701  (torch has no public name for it)

from .ops.extension import require_backend
from .record_format import FIELDS, pack_fields, unpack_fields

PADDING_ID = -1

# What follows the position dimensions in each field.
_TRAILING = {
    "ids": 1, "logprobs": 1, "log_norm": 1, "tail_logprob": 1, "label_logprob": 0, "valid": 0, "counts": 1,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class CompressedLogits:
    r"""The k most probable (or k sampled) vocabulary entries of each position, and how much the rest weighs.

    With :math:`p` the softmax of a row at T = 1, :math:`S` its kept entries and :math:`T` one of `temperatures`,

    .. math:: \mathrm{log\_norm} = \log \sum_v p_v^{1/T}, \qquad
              \mathrm{tail\_logprob} = \log \sum_{v \notin S} p_v^{1/T} - \mathrm{log\_norm},

    so that the probability of a kept entry at T is ``exp(logprobs / T - log_norm)``, and these and
    ``exp(tail_logprob)`` sum to 1.

    Entries are sorted: log-probability descending, ids ascending on ties. Where fewer than k entries have a positive
    probability (or were drawn), padding follows: id -1, log-probability -inf, count 0.

    A row that holds a NaN or +inf, or nothing but -inf, has `valid` False: all padding, NaN in the other fields.

    Attributes:
        ids: [..., k] int32.
        logprobs: [..., k] at T = 1; float32 (float64 for float64 logits), as are all log-probabilities here.
        log_norm: [..., T], T the number of temperatures; 0 at T = 1. In nats, as all logarithms here.
        tail_logprob: [..., T]; -inf where nothing was left out.
        label_logprob: [...], of the label at T = 1, NaN for a label outside of the vocabulary (an ignored one);
            None without labels.
        valid: [...] bool.
        counts: [..., k] int32, how often the entry was drawn, k draws in all; None for method "topk".
        temperatures: the T of log_norm and tail_logprob, in their order.
        vocab_size: entries of the row that was compressed.

    Example:
        >>> compressed = compress_logits(torch.randn(2, 8, 32000), k=64, temperatures=(1.0, 2.0))
        >>> compressed[0, :4].ids.shape
        torch.Size([4, 64])
    """

    ids: Tensor
    logprobs: Tensor
    log_norm: Tensor
    tail_logprob: Tensor
    label_logprob: Tensor | None
    valid: Tensor
    counts: Tensor | None
    temperatures: tuple[float, ...]
    vocab_size: int

    @property
    def k(self) -> int:
        return self.ids.shape[-1]

    @property
    def method(self) -> str:
        return "topk" if self.counts is None else "sample"

    @property
    def shape(self) -> torch.Size:
        """The shape of the positions."""
        return self.ids.shape[:-1]

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of compressed logits of a single position without dimensions.")
        return self.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CompressedLogits:
        return self._map(lambda x, _: x.to(device, non_blocking=non_blocking))

    def __getitem__(self, index: Any) -> CompressedLogits:
        """The positions `index` picks: an int, slice, tensor of integers, bool mask, None, ..., or a tuple of them."""
        parts = index if isinstance(index, tuple) else (index,)
        if Ellipsis in [part for part in parts if not isinstance(part, Tensor)]:
            return self._map(lambda x, trailing: x[parts + (slice(None),) * trailing])
        # Checked, since what is meant for positions would else reach into the k entries.
        consumed = sum(part.dim() if _is_mask(part) else part is not None for part in parts)
        if consumed > len(self.shape):
            raise IndexError(f"index {index!r} has {consumed} dimensions, the positions {list(self.shape)} have fewer.")
        return self._map(lambda x, _: x[index])

    def reshape(self, *shape: int) -> CompressedLogits:
        """The same positions in another shape, one size of which may be -1."""
        positions = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        return self._map(lambda x, trailing: x.reshape((*positions, *x.shape[x.dim() - trailing :])))

    def flatten(self) -> CompressedLogits:
        """All positions in one dimension."""
        count = self.shape.numel()
        return self._map(lambda x, trailing: x.reshape((count, *x.shape[x.dim() - trailing :])))

    def pack(self, codec: str = "q8") -> Tensor:
        """Bytes [..., bytes] uint8; codecs and their errors: `distillm_ext.packing.pack`."""
        require_backend(self.device, "compressed")
        rows = self.flatten()
        packed = pack_fields({name: getattr(rows, name) for name in FIELDS}, codec, self.vocab_size, self.temperatures)
        return packed.reshape(*self.shape, packed.shape[1])

    @staticmethod
    def unpack(
        packed: Tensor,
        *,
        codec: str,
        k: int,
        vocab_size: int,
        temperatures: Sequence[float] = (1.0,),
        method: str = "topk",
    ) -> CompressedLogits:
        """What `pack` was given, up to the error of the codec: `distillm_ext.packing.unpack`."""
        flat = CompressedLogits(**unpack_fields(packed, codec, k, vocab_size, temperatures, method))
        return flat.reshape(*packed.shape[:-1])

    def _map(self, function: Callable[[Tensor, int], Tensor]) -> CompressedLogits:
        """Every tensor x becomes function(x, dimensions after those of the positions)."""
        tensors = [(getattr(self, name), trailing) for name, trailing in _TRAILING.items()]
        mapped = [None if x is None else function(x, trailing) for x, trailing in tensors]
        return _unflatten(mapped, (self.temperatures, self.vocab_size))


def _is_mask(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype == torch.bool


def _flatten(value: CompressedLogits) -> tuple[list[Any], tuple[tuple[float, ...], int]]:
    return [getattr(value, name) for name in _TRAILING], (value.temperatures, value.vocab_size)


def _unflatten(tensors: Any, context: tuple[tuple[float, ...], int]) -> CompressedLogits:
    temperatures, vocab_size = context
    ids, logprobs, log_norm, tail, label, valid, counts = tensors
    return CompressedLogits(ids, logprobs, log_norm, tail, label, valid, counts, temperatures, vocab_size)


assert [field.name for field in fields(CompressedLogits)][: len(_TRAILING)] == list(_TRAILING)
# A tree of tensors to torch.compile, torch.export and activation checkpointing.
pytree.register_pytree_node(
    CompressedLogits,
    _flatten,
    _unflatten,
    serialized_type_name="distillm_ext.CompressedLogits",
    to_dumpable_context=list,
    from_dumpable_context=lambda context: (tuple(context[0]), context[1]),
)
