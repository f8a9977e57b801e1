"""The cache of teacher logits: what is written is found again by its tokens; misfits are refused with the reason."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import cache_world as world
import numpy as np
import packing_cases as cases
import pytest
import torch
from cache_world import SPECS, VOCAB, K, make_row
from tiers import full

from distillm_ext.teacher import (
    CacheError,
    CacheMismatch,
    CacheMiss,
    CacheSpec,
    CacheWriter,
    CompressionSettings,
    TeacherCache,
    finish_cache,
)

METHODS = ["topk", "sample"]


@pytest.mark.parametrize("method", METHODS)
def test_rows_in_any_order(tmp_path, method):
    cache = world.finished(tmp_path, method, 40)
    assert len(cache) == cache.manifest.rows == 40 and len(cache.manifest.shards) > 3
    for number in np.random.default_rng(1).permutation(40):
        world.check_row(cache, method, number)
    in_order = [row.tokens.tolist() for row in cache]
    assert in_order == [make_row(method, number)[0].tolist() for number in range(40)]
    assert cache.manifest.positions == sum(len(make_row(method, number)[1]) for number in range(40))
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("shard-*.json"))


@pytest.mark.parametrize("method", METHODS)
def test_lookup_unpacks_a_batch_end_to_end(tmp_path, method):
    cache = world.finished(tmp_path, method)
    chosen = [11, 3, 8, 3]
    compressed = cache.lookup([torch.from_numpy(make_row(method, n)[0]) for n in chosen])
    packed = torch.from_numpy(np.concatenate([make_row(method, n)[2] for n in chosen]))
    codec = SPECS[method].compression.codec
    expected = type(compressed).unpack(packed, codec=codec, k=K, vocab_size=VOCAB, method=method)
    assert compressed.shape == packed.shape[:1] and compressed.method == method
    assert torch.equal(compressed.ids, expected.ids) and torch.equal(compressed.logprobs, expected.logprobs)
    one = cache.lookup(make_row(method, 3)[0].tolist(), [make_row(method, 3)[1]])
    assert torch.equal(one.ids, expected[-len(one) :].ids)
    assert cache.lookup([]).shape == (0,)


def test_compressed_logits_are_packed_by_the_writer(tmp_path):
    compressed = cases.make(5, VOCAB, K, temperatures=(1.0, 2.0)).compressed()
    spec = CacheSpec(CompressionSettings(VOCAB, K, codec="exact", temperatures=(1.0, 2.0)))
    with CacheWriter(tmp_path, spec) as writer:
        assert writer.add([1, 2, 3, 4, 5, 6], 1, compressed)
        assert not writer.add([1, 2, 3, 4, 5, 6], 1, compressed) and len(writer) == 1
    finish_cache(tmp_path, spec)
    back = TeacherCache.open(tmp_path).lookup([1, 2, 3, 4, 5, 6])
    for name in ("ids", "logprobs", "log_norm", "tail_logprob", "label_logprob", "valid"):
        torch.testing.assert_close(getattr(back, name), getattr(compressed, name), rtol=0, atol=0, equal_nan=True)


def test_same_tokens_with_other_targets(tmp_path):
    """Targets are part of what a row is; without them the tokens alone find one."""
    packed = np.concatenate([make_row("topk", n)[2] for n in range(9)])
    tokens = np.arange(6)
    with CacheWriter(tmp_path, SPECS["topk"]) as writer:
        assert writer.add(tokens, 2, packed[:4]) and not writer.has(tokens, 4)
        assert writer.add(tokens, np.array([False, False, False, False, True, True]), packed[4:6])
        assert writer.has(tokens, [4, 5])
    finish_cache(tmp_path, SPECS["topk"])
    cache = TeacherCache.open(tmp_path)
    assert len(cache) == 2 and tokens in cache
    np.testing.assert_array_equal(cache.row(tokens, 2).packed, packed[:4])
    np.testing.assert_array_equal(cache.row(tokens, [4, 5]).packed, packed[4:6])
    with pytest.raises(CacheMiss, match=r"has these tokens, but with other targets.*starts with \[0, 1, 2"):
        cache.row(tokens, 3)
    with pytest.raises(CacheMiss, match="has no row: a sequence of 2 tokens"):
        cache.lookup([5, 5])


@pytest.mark.parametrize("at_once", [False, *full(True)])
def test_ranks_write_their_own_shards(tmp_path, at_once):
    """Four ranks, the last of which meets examples that another one has as well; `at_once`: processes of their own."""
    ranks = [(tmp_path, "topk", 40, rank, 4) for rank in range(4)]
    if at_once:
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            for job in [pool.submit(world.write, *rank) for rank in ranks]:
                job.result()
    else:
        for rank in ranks:
            world.write(*rank)
    with pytest.raises(CacheError, match="was not finished; run it again"):
        TeacherCache.open(tmp_path)
    finish_cache(tmp_path, SPECS["topk"])
    cache = TeacherCache.open(tmp_path)
    assert {info.file[:11] for info in cache.manifest.shards} == {f"shard-0000{rank}" for rank in range(4)}
    assert len(cache) == cache.manifest.rows == 40
    for number in range(40):
        world.check_row(cache, "topk", number)


def test_duplicates_over_ranks_count_once(tmp_path):
    writers = [CacheWriter(tmp_path, SPECS["topk"], rank=rank) for rank in range(2)]
    for writer in writers:
        assert writer.add(*make_row("topk", 5))
        writer.flush()
    for writer in writers:
        writer.close()
    assert finish_cache(tmp_path, SPECS["topk"]).rows == 2
    assert len(TeacherCache.open(tmp_path)) == len(list(TeacherCache.open(tmp_path))) == 1


def test_a_finished_cache_can_grow(tmp_path):
    world.finished(tmp_path, rows=10)
    files = {file: file.read_bytes() for file in world.shards(tmp_path)}
    with CacheWriter(tmp_path, SPECS["topk"]) as writer:
        tokens, targets, packed = make_row("topk", 3)
        assert len(writer) == 10 and writer.has(tokens, targets) and not writer.add(tokens, targets, packed)
    cache = world.finished(tmp_path, rows=25)
    assert len(cache) == cache.manifest.rows == 25 and all(
        file.read_bytes() == content for file, content in files.items()
    )
    for number in range(25):
        world.check_row(cache, "topk", number)


def test_one_writer_per_rank(tmp_path):
    with CacheWriter(tmp_path, SPECS["topk"]):
        with pytest.raises(CacheError, match="another process is writing to .* as rank 0"):
            CacheWriter(tmp_path, SPECS["topk"])
    CacheWriter(tmp_path, SPECS["topk"]).close()


def test_an_error_drops_the_rows_of_the_open_shard(tmp_path):
    with pytest.raises(RuntimeError, match="boom"), CacheWriter(tmp_path, SPECS["topk"]) as writer:
        writer.add(*make_row("topk", 0))
        raise RuntimeError("boom")
    assert not list(world.shards(tmp_path))


def read_in_worker(cache: TeacherCache) -> int:
    for number in range(20):
        world.check_row(cache, "topk", number)
    return len(cache)


def test_handles_are_reopened(tmp_path):
    cache = world.finished(tmp_path)
    sent = pickle.dumps(cache)
    assert len(sent) < 20_000 and read_in_worker(pickle.loads(sent)) == 30


@pytest.mark.slow
def test_handles_are_reopened_in_workers(tmp_path):
    cache = world.finished(tmp_path)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(read_in_worker, cache).result() == 30


def test_a_manifest_gives_the_settings_back(tmp_path):
    spec = replace(changed("sample", seed=5), details={"name": "a note"})
    CacheWriter(tmp_path, spec).close()
    manifest = finish_cache(tmp_path, spec)
    assert TeacherCache.open(tmp_path).manifest == manifest and manifest.spec == spec
    assert json.loads((tmp_path / "manifest.json").read_text())["details"] == {"name": "a note", "seed": 5}


def test_packed_bytes_need_no_torch(tmp_path):
    world.finished(tmp_path)
    tokens = make_row("topk", 4)[0].tolist()
    code = (
        "import sys; from distillm_ext.teacher import TeacherCache;"
        f"cache = TeacherCache.open({str(tmp_path)!r}); assert cache.packed({tokens}).dtype == 'uint8';"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1])


def test_another_teacher_tokenizer_or_dataset(tmp_path):
    world.finished(tmp_path)
    TeacherCache.open(tmp_path, teacher="t" * 64, tokenizer="k" * 64, dataset="d" * 64)
    with pytest.raises(CacheMismatch, match=r"another teacher \(cache tttttttttttt…, here xxxxxxxxxxxx…\); capture"):
        TeacherCache.open(tmp_path, teacher="x" * 64, tokenizer="k" * 64)
    with pytest.raises(CacheMismatch, match="another tokenizer .* and another dataset"):
        TeacherCache.open(tmp_path, teacher="t" * 64, tokenizer="x", dataset=[{"text": "a"}])


def changed(of, /, **change):
    spec = SPECS[of]
    return (
        replace(spec, **change)
        if "teacher" in change
        else replace(spec, compression=replace(spec.compression, **change))
    )


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("topk", dict(k=7)),
        ("topk", dict(codec="q4")),
        ("topk", dict(teacher="other")),
        ("topk", dict(temperatures=(1, 2))),
        ("topk", dict(method="sample")),
        ("sample", dict(labels=True)),
        ("sample", dict(seed=5)),
    ],
)
def test_a_folder_of_other_settings_is_refused(tmp_path, method, change):
    name = next(iter(change))
    world.write(tmp_path, method, rows=5)
    with pytest.raises(CacheMismatch, match=f"other settings .*{name}: .* there, .* here"):
        CacheWriter(tmp_path, changed(method, **change))
    with pytest.raises(CacheMismatch, match=name):
        finish_cache(tmp_path, changed(method, **change))


def test_notes_and_a_seed_that_draws_nothing_may_differ(tmp_path):
    world.write(tmp_path, rows=5)
    CacheWriter(tmp_path, changed("topk", seed=5)).close()
    CacheWriter(tmp_path, replace(SPECS["topk"], details={"name": "only a note"})).close()


@pytest.mark.parametrize(
    "tokens,targets,records,words",
    [
        ([1.5, 2], 1, 1, "tokens must be one row of integers"),
        ([[1, 2]], 1, 1, "tokens must be one row of integers"),
        ([-1, 2], 1, 1, r"tokens must lie in \[0, 2\*\*31\), got -1"),
        ([1, 2, 3], 0, 3, "targets must ascend within 1..2"),
        ([1, 2, 3], [2, 1], 2, "targets must ascend"),
        ([1, 2, 3], [3], 1, "targets must ascend"),
        ([1, 2, 3], np.array([False, True]), 1, "targets must be one mask of 3 entries"),
        ([1, 2, 3], 1, 1, r"records must be uint8 of shape \[2, \d+\], one for each of 2 targets"),
    ],
)
def test_rows_that_do_not_fit(tmp_path, tokens, targets, records, words):
    with CacheWriter(tmp_path, SPECS["topk"]) as writer, pytest.raises(ValueError, match=words):
        writer.add(tokens, targets, np.zeros((records, SPECS["topk"].compression.record_bytes), np.uint8))


def test_settings_that_do_not_fit(tmp_path):
    with CacheWriter(tmp_path, SPECS["topk"]) as writer, pytest.raises(ValueError, match="k 5, not 6; .*labels False"):
        writer.add([1, 2], 1, cases.make(1, VOCAB, 5, temperatures=(1.0,), labels=False).compressed())
    with pytest.raises(ValueError, match="method must be"):
        CompressionSettings(VOCAB, method="all")
    with pytest.raises(ValueError, match="codec must be"):
        CompressionSettings(VOCAB, codec="zip")
    with pytest.raises(TypeError, match="compression: expected CompressionSettings, got 300"):
        CacheSpec(VOCAB)
    with pytest.raises(ValueError, match="details: the seed belongs to the compression, got 3"):
        CacheSpec(SPECS["topk"].compression, details={"seed": 3})
    with pytest.raises(ValueError, match="verify must be"):
        TeacherCache.open(tmp_path, verify="none")
    with pytest.raises(CacheError, match="there is no cache"):
        TeacherCache.open(tmp_path / "nowhere")


@pytest.mark.parametrize("field,value", [("seed", 1.5), ("seed", "1"), ("k", True), ("vocab_size", 9.0), ("labels", 1)])
def test_fields_of_another_type_are_named(field, value):
    with pytest.raises(TypeError, match=field):
        CompressionSettings(**({"vocab_size": 50} | {field: value}))


@pytest.mark.parametrize("note,seed", [(7, 7), (None, 0), ("first", 0)])
def test_a_note_called_seed_of_an_earlier_cache(note, seed):
    values = CacheSpec(CompressionSettings(50)).to_json()
    assert CacheSpec.from_json(values | {"details": {"seed": note}}).compression.seed == seed
