"""The cache under damage: flipped bytes, cut files, writers killed at any moment. Errors, never wrong rows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import cache_world as world
import numpy as np
import pytest
from cache_world import SPECS

from distillm_ext.teacher import CacheDamaged, CacheError, TeacherCache, finish_cache
from distillm_ext.teacher.manifest import MANIFEST, manifest_checksum

ROWS = 30


def read_all(path: Path, method: str, verify: str = "structure") -> None:
    """Opens and reads everything, and finds what was written."""
    cache = TeacherCache.open(path, verify=verify)
    assert len(cache) == ROWS
    for number in range(ROWS):
        world.check_row(cache, method, number)


def flip(file: Path, at: int, mask: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= mask
    file.write_bytes(content)


def check_flips(path: Path, method: str, file: Path, places) -> None:
    rng = np.random.default_rng(2)
    for at in places:
        mask = int(rng.choice([1, 128, 255, rng.integers(1, 256)]))
        flip(file, int(at), mask)
        for verify in ("structure", "full"):
            with pytest.raises(CacheDamaged, match=str(file)):
                read_all(path, method, verify)
        flip(file, int(at), mask)


@pytest.mark.parametrize("method", ["topk", "sample"])
def test_flipped_bytes_of_a_shard(tmp_path, method):
    world.finished(tmp_path, method, ROWS)
    file = list(world.shards(tmp_path))[1]
    check_flips(tmp_path, method, file, range(0, file.stat().st_size, 97))
    read_all(tmp_path, method, "full")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["topk", "sample"])
def test_every_byte_of_a_shard(tmp_path, method):
    world.finished(tmp_path, method, ROWS)
    file = list(world.shards(tmp_path))[-1]
    check_flips(tmp_path, method, file, range(file.stat().st_size))


def test_flipped_bytes_of_the_manifest(tmp_path):
    """An error that names it, or (white space) no difference in meaning."""
    world.finished(tmp_path, rows=ROWS)
    file = tmp_path / MANIFEST
    rng = np.random.default_rng(4)
    caught = 0
    for at in range(0, file.stat().st_size, 41):
        mask = int(rng.integers(1, 256))
        flip(file, at, mask)
        try:
            read_all(tmp_path, "topk")
        except CacheError as error:
            assert str(file) in str(error)
            caught += 1
        flip(file, at, mask)
    assert caught > 40


def test_a_row_is_refused_alone(tmp_path):
    """A flip in one row's records: that row is an error, the others are read."""
    cache = world.finished(tmp_path, rows=ROWS)
    row = next(row for row in cache if row.packed.size > 40)
    file = next(file for file in world.shards(tmp_path) if row.packed.tobytes() in file.read_bytes())
    flip(file, file.read_bytes().index(row.packed.tobytes()) + 20, 4)
    damaged = TeacherCache.open(tmp_path)
    failures = 0
    for number in range(ROWS):
        try:
            world.check_row(damaged, "topk", number)
        except CacheDamaged as error:
            assert "does not fit its checksum" in str(error)
            failures += 1
    assert failures == 1
    with pytest.raises(CacheDamaged, match="not that of the manifest"):
        TeacherCache.open(tmp_path, verify="full")


def test_cut_missing_and_foreign_files(tmp_path):
    world.finished(tmp_path, rows=ROWS)
    file = next(world.shards(tmp_path))
    content = file.read_bytes()
    for size in (0, 1, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(CacheDamaged, match=f"has {size} bytes, {len(content)} were written"):
            TeacherCache.open(tmp_path)
    file.unlink()
    with pytest.raises(CacheDamaged, match=f"{file.name} is missing"):
        TeacherCache.open(tmp_path)
    file.write_bytes(content)
    (tmp_path / "shard-00007-000000.arrow").write_bytes(content)
    with pytest.raises(CacheDamaged, match="shard-00007-000000.arrow has no manifest; remove it"):
        world.write(tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(CacheError, match="was not finished"):
        TeacherCache.open(tmp_path)


@pytest.mark.parametrize("change,words", [({"version": 2}, "format version 2"), ({"format": "zip"}, "not the manif")])
def test_other_versions(tmp_path, change, words):
    world.finished(tmp_path, rows=3)
    file = tmp_path / MANIFEST
    body = {**json.loads(file.read_text()), **change}
    body.pop("checksum")
    file.write_text(json.dumps({**body, "checksum": manifest_checksum(body)}))
    with pytest.raises(CacheError, match=words):
        TeacherCache.open(tmp_path)


def test_another_version_is_said_whatever_its_checksum(tmp_path):
    world.finished(tmp_path, rows=3)
    file = tmp_path / MANIFEST
    body = json.loads(file.read_text())
    for version in (2, 0, "1", None):
        file.write_text(json.dumps({**body, "version": version}))
        with pytest.raises(CacheError, match=f"has format version {version!r}, this distillm_ext reads version 1"):
            TeacherCache.open(tmp_path)


def killed_writer(path: Path, method: str, rank: int, changes: int, delay: float) -> None:
    """Lets a process write and kills it `delay` seconds after the folder changed so often (a shard changes it thrice).

    Counted in changes, since a time alone would kill a busy machine's writer before its first shard.
    """
    process = get_context("fork").Process(target=world.write, args=(path, method, ROWS, rank, 2, 0.002))
    process.start()
    seen: set[str] = set()
    while process.is_alive() and changes > 0:
        now = {file.name for file in path.glob("shard-*")}
        changes, seen = changes - (now != seen), now
    time.sleep(delay)
    process.kill()
    process.join()


def torture(path: Path, seed: int) -> None:
    """Two ranks killed again and again, then completed: every row once, as if nothing had happened."""
    rng = np.random.default_rng([13, seed])
    method = ("topk", "sample")[seed % 2]
    for _ in range(rng.integers(1, 5)):
        changes, delay = int(rng.integers(0, 12)), float(rng.exponential(0.002))
        killed_writer(path, method, int(rng.integers(0, 2)), changes, delay)
        survivors = {file: file.read_bytes() for file in world.shards(path)}
    for rank in range(2):
        world.write(path, method, ROWS, rank, 2)
    assert all(file.read_bytes() == content for file, content in survivors.items())
    assert finish_cache(path, SPECS[method]).rows == ROWS
    read_all(path, method, "full")
    assert not list(path.glob("*.tmp"))
    file = rng.choice([*world.shards(path)])
    check_flips(path, method, Path(file), rng.integers(0, Path(file).stat().st_size, 3))


@pytest.mark.parametrize("seed", range(5))
def test_killed_and_flipped(tmp_path, seed):
    torture(tmp_path, seed)


@pytest.mark.slow
def test_killed_and_flipped_a_hundred_times(tmp_path):
    for seed in range(100, 200):
        torture(tmp_path / "cache", seed)
        shutil.rmtree(tmp_path / "cache")


@pytest.mark.parametrize("step", ["write_shard", "write", "move_into_place"])
def test_kill_between_the_steps_of_a_shard(tmp_path, monkeypatch, step):
    """The windows that a random kill seldom meets: before and after each of the three steps."""
    from distillm_ext.teacher import writer as module
    from distillm_ext.teacher.manifest import Manifest

    for after in (False, True):
        for count in (1, 2):
            path = tmp_path / f"{after}{count}"
            holder = Manifest if step == "write" else module
            with monkeypatch.context() as patch:
                patch.setattr(holder, step, _dying(getattr(holder, step), count, after))
                process = get_context("fork").Process(target=world.write, args=(path, "topk", ROWS))
                process.start()
                process.join()
            assert process.exitcode == -signal.SIGKILL
            world.finished(path, "topk", ROWS)
            read_all(path, "topk", "full")
            assert not list(path.glob("*.tmp")) and TeacherCache.open(path).manifest.rows == ROWS


def _dying(function, count: int, after: bool):
    """`function`, whose call number `count` kills the process, before or after it does its work."""
    calls = 0

    def call(*args):
        nonlocal calls
        calls += 1
        if calls == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


def test_what_a_kill_left_is_removed(tmp_path):
    world.write(tmp_path, rows=3)
    left = [tmp_path / "shard-00000-000009.arrow.tmp", tmp_path / "shard-00000-000009.json"]
    left[0].write_bytes(b"half a shard")
    shutil.copy(next(tmp_path.glob("shard-*.json")), left[1])
    world.write(tmp_path, rows=ROWS)
    assert not any(file.exists() for file in left)
    finish_cache(tmp_path, SPECS["topk"])
    read_all(tmp_path, "topk", "full")
