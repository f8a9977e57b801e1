"""Batches: padding, masks, and which position predicts which target; plain-text blocks."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from trainer_world import tiny_tokenizer

from distillm_ext.data.batches import DistillationCollator
from distillm_ext.data.plain_text import PlainTextBatches, pack_text


def feature(ids, mask, row=0):
    return {"input_ids": ids, "loss_mask": mask, "prompt_length": mask.index(1) if 1 in mask else len(ids), "row": row}


def test_first_response_token_and_eos_are_targets():
    batch = DistillationCollator(0)([feature([5, 6, 7, 2], [0, 0, 1, 1])])
    # Position 1 (the last prompt token) predicts token 7, position 2 predicts EOS.
    assert batch["positions"].tolist() == [1, 2] and batch["targets"].tolist() == [7, 2]


def test_padding_is_right_and_masked_by_place_not_by_id():
    pad = 2  # the same id as EOS
    batch = DistillationCollator(pad)([feature([5, 7, 2], [0, 1, 1]), feature([5, 6, 7, 8, 2], [0, 0, 0, 1, 1], row=9)])
    assert batch["input_ids"].tolist() == [[5, 7, 2, 2, 2], [5, 6, 7, 8, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 7, 2, -100, -100], [-100, -100, -100, 8, 2]]
    assert batch["positions"].tolist() == [0, 1, 7, 8] and batch["targets"].tolist() == [7, 2, 8, 2]
    assert batch["num_tokens"] == 8 and batch["row"].tolist() == [0, 9]


def test_positions_agree_with_shifted_labels():
    rng = np.random.default_rng(0)
    features = []
    for row in range(7):
        length = int(rng.integers(1, 12))
        features.append(feature(rng.integers(3, 60, length).tolist(), rng.integers(0, 2, length).tolist(), row))
    batch = DistillationCollator(0, pad_to_multiple_of=8)(features)
    assert batch["input_ids"].shape[1] % 8 == 0
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100).flatten()
    assert batch["positions"].tolist() == (shifted != -100).nonzero().flatten().tolist()
    assert batch["targets"].tolist() == shifted[shifted != -100].tolist()


def test_a_target_without_predecessor_has_no_loss():
    assert len(DistillationCollator(0)([feature([5, 6], [1, 0])])["targets"]) == 0


def test_mask_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="loss_mask: expected 3 entries"):
        DistillationCollator(0)([feature([5, 6, 7], [0, 1], row=4)])


def test_text_is_joined_with_eos_and_cut():
    tokenizer = tiny_tokenizer()
    blocks = pack_text(Dataset.from_dict({"text": ["w5 w6 w7", "w8"]}), tokenizer, max_length=4)
    assert [block.tolist() for block in blocks] == [[5, 6, 7, 2], [8, 2]]


def test_a_last_block_of_one_token_is_dropped():
    blocks = pack_text(Dataset.from_dict({"input_ids": [[4, 5, 6], [7, 8]]}), None, max_length=4)
    assert [block.tolist() for block in blocks] == [[4, 5, 6, 7]]


@pytest.mark.parametrize("columns", [{"body": ["w5"]}, {"text": [""]}])
def test_text_that_cannot_be_used(columns):
    with pytest.raises(ValueError, match="corpus: "):
        pack_text(Dataset.from_dict(columns), tiny_tokenizer(), max_length=4, source="corpus")


def plain_batches(batch_size, micro_batches, rank=0, world=1):
    blocks = [np.array([row, row]) for row in range(10)]
    return PlainTextBatches(
        blocks, DistillationCollator(0), batch_size=batch_size, micro_batches=micro_batches, seed=0, rank=rank,
        world_size=world, device=torch.device("cpu"),
    )  # fmt: skip


def test_a_step_takes_the_same_text_however_it_is_split():
    whole = [plain_batches(4, 1).step(step, 1)[0]["row"].tolist() for step in range(5)]
    accumulated = [[b["row"].tolist() for b in plain_batches(2, 2).step(step, 2)] for step in range(5)]
    assert [sum(parts, []) for parts in accumulated] == whole
    ranks = [[plain_batches(2, 1, rank, 2).step(step, 1)[0]["row"].tolist() for rank in (0, 1)] for step in range(5)]
    assert [sum(parts, []) for parts in ranks] == whole
    # Two epochs over ten blocks in five steps of four: every block twice.
    assert sorted(sum(whole, [])) == sorted([*range(10), *range(10)])


def test_a_short_last_window_does_not_shift_later_steps():
    batches = plain_batches(2, 2)
    batches.step(0, 1)
    assert [b["row"].tolist() for b in batches.step(1, 2)] == [
        b["row"].tolist() for b in plain_batches(2, 2).step(1, 2)
    ]
