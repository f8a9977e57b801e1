"""The store of packed records: memory limit, spill file, eviction, checkpoints."""

import gc

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distillm_ext.teacher.keys import draw_positions, sequence_key
from distillm_ext.teacher.records import MemoryBudget, RecordStore, SpillFile
from distillm_ext.training.checkpoint import write_tensors

BYTES = 5


def records(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, BYTES), dtype=np.uint8)


def key(number):
    return bytes([number]) * 24


def filled(tmp_path, limit, counts=(3, 1, 4, 2)):
    store = RecordStore(BYTES, MemoryBudget(limit), tmp_path / "a.spill")
    for number, count in enumerate(counts):
        store.put(key(number), records(count, number))
    return store


def assert_content(store, counts, without=()):
    for number, count in enumerate(counts):
        found = store.get(key(number))
        if number in without:
            assert found is None and key(number) not in store
        else:
            np.testing.assert_array_equal(found, records(count, number))


@pytest.mark.parametrize("limit", [0, 3 * BYTES, 8 * BYTES, 1000])
def test_what_goes_in_comes_out_wherever_it_lies(tmp_path, limit):
    store = filled(tmp_path, limit)
    assert_content(store, (3, 1, 4, 2))
    assert len(store) == 4 and store.get(key(9)) is None
    assert store.memory_bytes <= limit and store.memory_bytes + store.disk_bytes == 10 * BYTES
    assert (tmp_path / "a.spill").exists() == (limit < 10 * BYTES)


def test_the_budget_is_shared_and_given_back(tmp_path):
    budget = MemoryBudget(4 * BYTES)
    first, second = (RecordStore(BYTES, budget, tmp_path / f"{name}.spill") for name in "ab")
    first.put(key(0), records(3, 0))
    second.put(key(1), records(2, 1))
    assert (first.memory_bytes, second.memory_bytes, second.disk_bytes) == (3 * BYTES, 0, 2 * BYTES)
    first.retain(set())
    second.put(key(2), records(4, 2))
    assert second.memory_bytes == 4 * BYTES and budget.used == 4 * BYTES


def test_retain_drops_the_others_and_slots_are_used_again(tmp_path):
    store = filled(tmp_path, 3 * BYTES)
    store.retain({key(0), key(2)})
    assert_content(store, (3, 1, 4, 2), without=(1, 3))
    assert store.disk_bytes == 4 * BYTES
    store.put(key(1), records(1, 1))
    store.put(key(3), records(2, 3))
    assert_content(store, (3, 1, 4, 2))
    assert len(store.pack()["spilled"]) == 7  # no more slots than before


def test_the_first_records_of_a_key_stay(tmp_path):
    store = filled(tmp_path, 1000)
    store.put(key(0), records(3, 99))
    assert_content(store, (3, 1, 4, 2))


def test_the_caller_may_write_over_what_it_gave(tmp_path):
    store, given = RecordStore(BYTES, MemoryBudget(1000), tmp_path / "a.spill"), records(3, 0)
    store.put(key(0), given)
    given[:] = 0
    assert_content(store, (3,))


def test_the_file_grows_over_many_records(tmp_path):
    store = RecordStore(BYTES, MemoryBudget(0), tmp_path / "a.spill")
    for number in range(40):
        store.put(key(number), records(100, number))
    assert_content(store, [100] * 40)


def test_the_spill_file_goes_with_its_store_and_no_other(tmp_path):
    path = tmp_path / "a.spill"
    path.write_bytes(b"left by a killed run")
    old = filled(tmp_path, 0)
    new = filled(tmp_path, 0)
    del old
    gc.collect()
    assert path.exists()
    assert_content(new, (3, 1, 4, 2))
    new.put(key(7), records(5000, 7))
    del new
    gc.collect()
    assert not path.exists()


@pytest.mark.parametrize("limit", [0, 3 * BYTES, 1000])
@pytest.mark.parametrize("new_limit", [0, 4 * BYTES, 1000])
def test_a_checkpoint_holds_all_of_it(tmp_path, limit, new_limit):
    store = filled(tmp_path, limit)
    store.retain({key(0), key(2), key(3)})
    write_tensors(tmp_path / "c.safetensors", store.pack())
    other = RecordStore(BYTES, MemoryBudget(new_limit), tmp_path / "b.spill")
    other.unpack(load_file(tmp_path / "c.safetensors"))
    assert_content(other, (3, 1, 4, 2), without=(1,))
    part = RecordStore(BYTES, MemoryBudget(new_limit), tmp_path / "d.spill")
    part.unpack(store.pack(), only={key(2)})
    assert_content(part, (3, 1, 4, 2), without=(0, 1, 3))


def test_an_empty_store_and_a_sequence_without_targets(tmp_path):
    store = RecordStore(BYTES, MemoryBudget(0), tmp_path / "a.spill")
    other = RecordStore(BYTES, MemoryBudget(0), tmp_path / "b.spill")
    other.unpack(store.pack())
    assert len(other) == 0
    store.put(key(0), records(0, 0))
    assert store.get(key(0)).shape == (0, BYTES)
    other.unpack(store.pack())
    assert other.get(key(0)).shape == (0, BYTES)


def test_damaged_checkpoints_and_wrong_records_are_refused(tmp_path):
    store = filled(tmp_path, 3 * BYTES)
    packed = store.pack()
    other = RecordStore(BYTES, MemoryBudget(0), tmp_path / "b.spill")
    with pytest.raises(ValueError, match="counts that add up to"):
        other.unpack(packed | {"counts": packed["counts"] + 1})
    with pytest.raises(ValueError, match="in a file of"):
        other.unpack(packed | {"slots": packed["slots"] + 10**6})
    with pytest.raises(ValueError, match=r"expected uint8 \[n, 5\]"):
        store.put(key(8), np.zeros((2, 6), dtype=np.uint8))


def test_safetensors_files_written_piece_by_piece_are_whole(tmp_path):
    tensors = {
        "a": torch.arange(7), "b": torch.arange(9, dtype=torch.uint8).view(3, 3),
        "c": torch.empty(0, 4, dtype=torch.uint8), "d": torch.arange(6).view(2, 3).t(),
    }  # fmt: skip
    write_tensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())


def test_a_spill_file_without_records_makes_no_file(tmp_path):
    file = SpillFile(tmp_path / "a.spill", BYTES)
    assert file.content().shape == (0, BYTES) and not (tmp_path / "a.spill").exists()


# ---- keys


def test_a_key_depends_on_tokens_and_targets_alone():
    base = sequence_key([1, 5, 6, 7], [0, 0, 1, 1])
    assert base == sequence_key(np.array([1, 5, 6, 7]), np.array([False, False, True, True]))
    assert base == sequence_key([1, 5, 6, 7], [1, 0, 1, 1])  # the first token never is a target
    others = [
        sequence_key([1, 5, 6, 8], [0, 0, 1, 1]),
        sequence_key([1, 5, 6, 7], [0, 1, 1, 1]),
        sequence_key([1, 4, 6, 7], [0, 0, 1, 1]),  # the same response to another prompt
        sequence_key([0, 5, 6, 7], [0, 0, 1, 1]),
        sequence_key([5, 6, 7], [0, 1, 1]),
    ]
    assert base not in others and len(set(others)) == 5 and len(base) == 24


def test_draws_are_numbered_by_sequence_and_index():
    one, two = sequence_key([1, 2, 3], [0, 1, 1]), sequence_key([1, 2, 4], [0, 1, 1])
    both = draw_positions([one, two], [2, 3])
    assert both.dtype == np.int64 and (both >= 0).all() and len(set(both.tolist())) == 5
    np.testing.assert_array_equal(both[2:], draw_positions([two], [3]))
    assert draw_positions([], []).shape == (0,)
