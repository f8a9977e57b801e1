"""The key-value cache of the decode loop: rows join and leave a batch without the others being copied.

transformers' `DynamicCache` concatenates every layer's keys and values at every step and copies the whole cache when
rows leave. `RowCache` writes into buffers allocated once: a step writes one column, a row that leaves is replaced by
the last one, and prompts of different lengths are prefilled one length at a time into the places where they belong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Attention of these kinds reads keys and values by column alone. A sliding window is then a matter of the mask, which
# the model derives itself; chunked attention and recurrent states depend on where a row begins.
_PLAIN_ATTENTION = {"full_attention", "sliding_attention"}

# What stands for a layer that keeps nothing, such as one that reads the keys of another. transformers before 5.23 has
# no name for it: there such layers are left out of the cache.
_EMPTY_LAYERS: tuple[type, ...] = (cache_utils.DummyLayer,) if hasattr(cache_utils, "DummyLayer") else ()


@dataclass
class Window:
    """The part of the buffers that the next forward pass reads and extends: all layers share one.

    Attributes:
        slots, columns: size of the buffers.
        first, last: rows [first, last).
        start, stop: columns [start, stop) that hold keys already.
    """

    slots: int
    columns: int
    first: int = 0
    last: int = 0
    start: int = 0
    stop: int = 0


class RowLayer(DynamicLayer):
    """Keys and values of one layer, [slots, heads, columns, width], allocated at the first update."""

    keys: Any
    values: Any

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros: a masked column has weight 0 in attention, and 0 times an uninitialised NaN would still be NaN.
        self.keys, self.values = (
            states.new_zeros(self.window.slots, states.shape[1], self.window.columns, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new columns and returns views of all columns of the window."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self.window
        end = window.stop + key_states.shape[-2]
        found = []
        for buffer, states in zip(self._buffers(), (key_states, value_states), strict=True):
            rows = buffer[window.first : window.last]
            rows[:, :, window.stop : end] = states
            found.append(rows[:, :, window.start : end])
        return found[0], found[1]

    def _buffers(self) -> list[Tensor]:
        return [buffer for buffer in (self.keys, self.values) if self.is_initialized and buffer is not None]

    def get_seq_length(self) -> int:
        return self.window.stop - self.window.start

    def move_rows(self, source: Tensor, target: Tensor) -> None:
        """Copies the columns of the window in rows `source` to rows `target`."""
        columns = slice(self.window.start, self.window.stop)
        for buffer in self._buffers():
            buffer[target, :, columns] = buffer[source, :, columns]

    def clear(self, rows: slice, columns: slice) -> None:
        """Zeros in some columns of some rows."""
        for buffer in self._buffers():
            buffer[rows, :, columns] = 0

    def move_columns(self, rows: int, start: int, stop: int) -> None:
        """Copies the columns [start, stop) of the first `rows` rows to the left end."""
        for buffer in self._buffers():
            buffer[:rows, :, : stop - start] = buffer[:rows, :, start:stop].clone()


class RowCache(DynamicCache):
    """A `DynamicCache` over shared buffers.

    Args:
        config: the model's configuration; `supports_rows` must hold for it.
        slots: most rows.
        columns: most columns.
    """

    def __init__(self, config: Any, slots: int, columns: int) -> None:
        super().__init__(config=config)
        self.window = Window(slots, columns)
        self.layers = [layer if isinstance(layer, _EMPTY_LAYERS) else RowLayer(self.window) for layer in self.layers]

    def _buffers(self) -> list[RowLayer]:
        return [layer for layer in self.layers if isinstance(layer, RowLayer)]

    def move_rows(self, source: Tensor, target: Tensor) -> None:
        """Copies the window's columns in rows `source` to rows `target`, both [n] int64 on the device."""
        for layer in self._buffers():
            layer.move_rows(source, target)

    def clear(self, rows: slice, columns: slice) -> None:
        """Forgets what former rows left: masked columns have weight 0, which a NaN in them would survive."""
        for layer in self._buffers():
            layer.clear(rows, columns)

    def move_columns(self, rows: int, start: int, stop: int) -> None:
        """Copies the columns [start, stop) of the first `rows` rows to the left end of the buffers."""
        for layer in self._buffers():
            layer.move_columns(rows, start, stop)


def supports_rows(config: Any) -> bool:
    """Whether `RowCache` serves the architecture: full or sliding-window attention in every layer."""
    decoder = config.get_text_config(decoder=True)
    declared = set(getattr(decoder, "layer_types", None) or ())
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    return (
        declared <= _PLAIN_ATTENTION
        and getattr(decoder, "attention_chunk_size", None) is None
        and kinds <= {DynamicLayer, DynamicSlidingWindowLayer, *_EMPTY_LAYERS}
        and not kinds <= set(_EMPTY_LAYERS)
    )


def column_mask(starts: Tensor, width: int) -> Tensor:
    """[rows, width] int64 attention mask: 1 from each row's own start on."""
    return (torch.arange(width, device=starts.device) >= starts.unsqueeze(1)).long()
