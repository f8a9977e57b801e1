"""`Sequence`: one prompt with its response as token ids, the currency between data, generation and replay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


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

    def to_feature(self) -> dict[str, object]:
        """The row that `DistillationCollator` takes."""
        mask = np.ones(len(self.input_ids), dtype=np.int64)
        mask[: self.prompt_length] = 0
        feature = {"input_ids": self.input_ids, "loss_mask": mask}
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
