"""The replay buffer and the sequences in it."""

from collections import Counter

import numpy as np
import pytest
import torch

from distillm_ext.data.sequences import TokenSequence, pack_sequences, unpack_sequences
from distillm_ext.training.rollouts.replay import ReplayBuffer


def sequences(*rows):
    return [TokenSequence.join([1, row], range(row % 3 + 1), row) for row in rows]


def rows_of(found):
    return [sequence.row for sequence in found]


def test_first_in_first_out():
    buffer = ReplayBuffer(3, seed=0)
    for row in range(5):
        buffer.extend(sequences(row))
    assert rows_of(buffer.sequences()) == [2, 3, 4] and len(buffer) == 3


def test_samples_are_distinct_and_uniform():
    buffer = ReplayBuffer(10, seed=0)
    buffer.extend(sequences(*range(10)))
    counts: Counter[int] = Counter()
    for step in range(1000):
        drawn = rows_of(buffer.sample(4, step=step))
        assert len(set(drawn)) == 4
        counts.update(drawn)
    assert all(abs(count - 400) < 70 for count in counts.values())


def test_a_draw_depends_on_seed_step_and_rank_alone():
    def draw(seed=0, rank=0, step=3):
        buffer = ReplayBuffer(50, seed=seed, rank=rank)
        buffer.extend(sequences(*range(50)))
        np.random.seed(step)
        torch.manual_seed(step)
        return rows_of(buffer.sample(5, step=step))

    assert draw() == draw()
    assert len({tuple(draw()), tuple(draw(seed=1)), tuple(draw(rank=1)), tuple(draw(step=4))}) == 4


def test_packed_content_comes_back_exactly():
    buffer = ReplayBuffer(4, seed=0)
    buffer.extend(sequences(*range(6)))
    copy = ReplayBuffer(4, seed=0)
    copy.extend(sequences(99))
    copy.unpack(buffer.pack())
    assert rows_of(copy.sequences()) == [2, 3, 4, 5]
    for mine, theirs in zip(buffer.sequences(), copy.sequences(), strict=True):
        assert (mine.input_ids == theirs.input_ids).all() and mine.prompt_length == theirs.prompt_length


def test_empty_content_comes_back_empty():
    assert unpack_sequences(pack_sequences([])) == []


def test_damaged_content_is_refused():
    packed = pack_sequences(sequences(1, 2))
    packed["input_ids"] = packed["input_ids"][:-1]
    with pytest.raises(ValueError, match="lengths add up"):
        unpack_sequences(packed)


def test_errors():
    with pytest.raises(ValueError, match="capacity"):
        ReplayBuffer(0, seed=0)
    with pytest.raises(ValueError, match="holds 0"):
        ReplayBuffer(2, seed=0).sample(1, step=0)


def test_every_response_token_is_a_target():
    feature = TokenSequence.join([5, 6], [7, 2], row=3).to_feature()
    assert list(feature["input_ids"]) == [5, 6, 7, 2] and list(feature["loss_mask"]) == [0, 0, 1, 1]
    assert (feature["prompt_length"], feature["row"]) == (2, 3)
