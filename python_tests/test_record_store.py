"""The store of packed records: its temporary file, eviction, checkpoints."""

import gc
import multiprocessing
import os
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distillm_ext.teacher.keys import draw_positions, sequence_key
from distillm_ext.teacher.records import RecordStore
from distillm_ext.training.checkpoints.folders import write_tensors

BYTES = 5
COUNTS = (3, 1, 4, 2)


def records(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, BYTES), dtype=np.uint8)


def key(number):
    return bytes([number]) * 24


def filled(tmp_path, counts=COUNTS):
    store = RecordStore(BYTES, tmp_path)
    for number, count in enumerate(counts):
        store.put(key(number), records(count, number))
    return store


def assert_content(store, counts=COUNTS, without=()):
    for number, count in enumerate(counts):
        found = store.get(key(number))
        if number in without:
            assert found is None and key(number) not in store
        else:
            np.testing.assert_array_equal(found, records(count, number))


def file_bytes(store):
    return os.fstat(store._file.fileno()).st_size


def test_what_goes_in_comes_out(tmp_path):
    store = filled(tmp_path)
    assert_content(store)
    assert len(store) == 4 and list(store.keys()) == [key(number) for number in range(4)]
    assert store.get(key(9)) is None and store.nbytes == file_bytes(store) == 10 * BYTES


def test_the_first_records_of_a_key_stay_whatever_the_caller_does(tmp_path):
    store, wide = RecordStore(BYTES, tmp_path), np.zeros((3, 2 * BYTES), np.uint8)
    wide[:, ::2] = records(3, 0)
    store.put(key(0), wide[:, ::2])
    wide[:] = 0
    store.get(key(0))[:] = 0
    store.put(key(0), records(3, 99))
    assert_content(store, (3,))


def test_a_buffer_that_turns_over_keeps_its_file_small(tmp_path):
    store, counts = RecordStore(BYTES, tmp_path), [17] * 200
    for number, count in enumerate(counts):
        store.put(key(number), records(count, number))
        store.retain({key(held) for held in range(number - 7, number + 1) if held >= 0})
        assert number < 8 or store.nbytes == 8 * 17 * BYTES
        assert file_bytes(store) <= 2 * store.nbytes + 17 * BYTES
    assert_content(store, counts, without=range(192))
    store.retain(set())
    assert len(store) == store.nbytes == 0 and store.get(key(199)) is None


def test_neither_the_store_nor_its_checkpoint_is_a_copy_in_memory(tmp_path):
    store = RecordStore(1024, tmp_path)
    piece = np.ones((1024, 1024), np.uint8)  # 1 MiB
    tracemalloc.start()
    for number in range(24):
        store.put(key(number), piece)
        store.get(key(number // 2))
    write_tensors(tmp_path / "c.safetensors", store.pack())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert store.nbytes == 24 * 2**20 and peak < 4 * 2**20


# ---- the file


def test_the_file_has_no_name_and_goes_with_the_store(tmp_path):
    store = filled(tmp_path / "made" / "for it")
    assert list((tmp_path / "made" / "for it").iterdir()) == []
    handle = store._file.fileno()
    before = os.fstat(handle)
    tensors = store.pack()
    del store
    gc.collect()
    try:
        assert not os.path.samestat(before, os.fstat(handle))
    except OSError:
        pass  # closed, and its number not given to another file
    assert int(tensors["counts"].sum()) == len(tensors["records"])  # its map outlives it


def test_a_forked_process_reads_the_store_and_takes_nothing_along(tmp_path):
    store, context = filled(tmp_path), multiprocessing.get_context("fork")
    child = context.Process(target=assert_content, args=(store,))
    child.start()
    child.join()
    assert child.exitcode == 0
    store.put(key(4), records(6, 4))
    assert_content(store, (*COUNTS, 6))


def test_a_write_that_is_cut_short_goes_on_and_one_that_fails_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    whole, room = os.pwrite, [10**6]

    def short(handle, data, offset):
        if room[0] <= 0:
            raise OSError(28, "No space left on device")
        room[0] -= 3
        return whole(handle, data[:3], offset)

    monkeypatch.setattr(os, "pwrite", short)
    store = filled(tmp_path)
    assert_content(store)
    room[0] = 6
    with pytest.raises(OSError, match=r"do not fit into .* in .*, which has 0.0 MiB of them \(No space left on device"):
        store.put(key(4), records(6, 4))
    assert key(4) not in store and store.nbytes == 10 * BYTES
    with pytest.raises(OSError, match="No space left on device"):  # the smaller file needs room for a moment
        store.retain({key(0)})
    assert_content(store, without=(1, 2, 3))
    room[0] = 10**6
    store.put(key(4), records(6, 4))
    assert_content(store, (*COUNTS, 6), without=(1, 2, 3))


# ---- checkpoints


def old_pack():
    """As earlier releases wrote it: of some keys in reused slots of a file, others of which belong to nobody."""
    taken = [6, 2, 3, 0, 5, 1]
    slots = np.random.default_rng(99).integers(0, 256, (8, BYTES), dtype=np.uint8)
    slots[taken] = np.concatenate([records(4, 2), records(2, 3)])
    return {
        "keys": torch.from_numpy(np.repeat(np.arange(4, dtype=np.uint8)[:, None], 24, axis=1)),
        "counts": torch.tensor(COUNTS),
        "records": torch.from_numpy(np.concatenate([records(3, 0), records(1, 1)])),
        "spilled": torch.from_numpy(slots),
        "slots": torch.tensor(taken),
    }


def restored(tmp_path, packed, only=None):
    write_tensors(tmp_path / "c.safetensors", packed)
    store = RecordStore(BYTES, tmp_path)
    store.unpack(load_file(tmp_path / "c.safetensors"), only=only)
    return store


def test_a_checkpoint_holds_all_of_it(tmp_path):
    store = filled(tmp_path)
    store.retain({key(0), key(2), key(3)})
    packed = store.pack()
    assert packed["counts"].tolist() == [3, 4, 2] and len(packed["records"]) == 9  # nothing of what was dropped
    assert_content(restored(tmp_path, packed), without=(1,))
    assert_content(restored(tmp_path, packed, only={key(2)}), without=(0, 1, 3))
    assert_content(store, without=(1,))


def test_what_was_packed_stays_while_the_store_goes_on(tmp_path):
    store = filled(tmp_path)
    packed = store.pack()
    store.retain({key(3)})
    store.put(key(4), records(50, 4))
    assert_content(restored(tmp_path, packed))
    assert_content(store, (*COUNTS, 50), without=(0, 1, 2))


def test_checkpoints_of_earlier_releases_are_read_and_theirs_have_the_same_tensors(tmp_path):
    old = old_pack()
    assert_content(restored(tmp_path, old))
    assert_content(restored(tmp_path, old, only={key(1), key(2)}), without=(0, 3))
    new = filled(tmp_path).pack()
    assert {name: (x.dtype, x.ndim) for name, x in new.items()} == {name: (x.dtype, x.ndim) for name, x in old.items()}


def test_an_empty_store_makes_no_file_and_a_sequence_may_have_no_targets(tmp_path):
    store = RecordStore(BYTES, tmp_path / "a")
    assert len(restored(tmp_path, store.pack())) == 0 and not (tmp_path / "a").exists()
    store.put(key(0), records(0, 0))
    assert restored(tmp_path, store.pack()).get(key(0)).shape == (0, BYTES)


def test_damaged_checkpoints_and_records_of_another_size_are_refused(tmp_path):
    packed, store = old_pack(), RecordStore(BYTES, tmp_path)
    with pytest.raises(ValueError, match="counts that add up to"):
        store.unpack(packed | {"counts": packed["counts"] + 1})
    with pytest.raises(ValueError, match="more in 8 slots"):
        store.unpack(packed | {"slots": packed["slots"] + 10**6})
    for wrong in (np.zeros((2, 6), np.uint8), np.zeros(BYTES, np.uint8), np.zeros((2, BYTES), np.int8)):
        with pytest.raises(ValueError, match=r"expected uint8 \[n, 5\]"):
            store.put(key(8), wrong)


def test_safetensors_files_written_piece_by_piece_are_whole(tmp_path):
    tensors = {
        "a": torch.arange(7), "b": torch.arange(9, dtype=torch.uint8).view(3, 3),
        "c": torch.empty(0, 4, dtype=torch.uint8), "d": torch.arange(6).view(2, 3).t(),
    }  # fmt: skip
    write_tensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())


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


def test_a_folder_that_is_none_is_not_called_full(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot keep .* temporary file in .*inside: Not a directory"):
        RecordStore(BYTES, tmp_path / "file" / "inside").put(key(0), records(0, 1))
