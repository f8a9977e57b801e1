"""`Sequence`: one prompt with its response as token ids, the currency between data, generation and replay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from distillm_ext.teacher.keys import sequence_key


@dataclass(frozen=True)
class TokenSequence:
    """A prompt and a response.

    Attributes:
        input_ids: [length] int64, prompt then response.
        prompt_length: number of prompt tokens; every later token is a target.
        row: row of the training set that the prompt comes from.
    """

    input_ids: np.ndarray
    prompt_length: int
    row: int

    @classmethod
    def join(cls, prompt: Iterable[int], response: Iterable[int], row: int) -> TokenSequence:
        """Puts a response behind its prompt."""
        prompt, response = list(prompt), list(response)
        return cls(np.array(prompt + response, dtype=np.int64), len(prompt), row)

    @property
    def loss_mask(self) -> np.ndarray:
        """[length] int64, 1 at every token of the response."""
        return (np.arange(len(self.input_ids)) >= self.prompt_length).astype(np.int64)

    @cached_property
    def key(self) -> bytes:
        """What names the sequence and its targets, see `sequence_key`."""
        return sequence_key(self.input_ids, self.loss_mask)

    def to_feature(self) -> dict[str, object]:
        """The row that `DistillationCollator` takes."""
        feature = {"input_ids": self.input_ids, "loss_mask": self.loss_mask}
        return {**feature, "prompt_length": self.prompt_length, "row": self.row}


def pack_sequences(sequences: Iterable[TokenSequence]) -> dict[str, Tensor]:
    """Flat tensors for a safetensors file: all ids end to end, and per sequence length, prompt length and row."""
    sequences = list(sequences)
    ids = [sequence.input_ids for sequence in sequences] or [np.empty(0, dtype=np.int64)]
    columns = {
        "length": [len(sequence.input_ids) for sequence in sequences],
        "prompt_length": [sequence.prompt_length for sequence in sequences],
        "row": [sequence.row for sequence in sequences],
    }
    packed = {name: torch.tensor(values, dtype=torch.int64) for name, values in columns.items()}
    return {"input_ids": torch.from_numpy(np.concatenate(ids)), **packed}


def unpack_sequences(packed: dict[str, Tensor]) -> list[TokenSequence]:
    """Inverse of `pack_sequences`.

    Raises:
        ValueError: the lengths do not add up, so the file is damaged.
    """
    lengths = packed["length"].numpy()
    ids = packed["input_ids"].numpy()
    if int(lengths.sum()) != len(ids):
        raise ValueError(f"stored sequences: lengths add up to {int(lengths.sum())}, but {len(ids)} ids are stored")
    pieces = np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []
    prompts, rows = packed["prompt_length"].tolist(), packed["row"].tolist()
    return [TokenSequence(piece.copy(), p, r) for piece, p, r in zip(pieces, prompts, rows, strict=True)]
