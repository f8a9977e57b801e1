"""Small caches of teacher logits for the tests: rows that a seed decides, a writer process that can be killed."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import packing_cases as cases

from distillm_ext.teacher import CacheSpec, CacheWriter, CompressionSettings, TeacherCache, finish_cache

VOCAB, K = 300, 6
SPECS = {
    "topk": CacheSpec(CompressionSettings(VOCAB, K), teacher="t" * 64, tokenizer="k" * 64, dataset="d" * 64),
    "sample": CacheSpec(CompressionSettings(VOCAB, K, method="sample", codec="q6", labels=False)),
}
_POOL = {
    "topk": cases.make(90, VOCAB, K, "topk", (1.0,)).pack("q8"),
    "sample": cases.make(90, VOCAB, K, "sample", (1.0,), labels=False).pack("q6"),
}
Row = tuple[np.ndarray, np.ndarray, np.ndarray]


def make_row(method: str, number: int) -> Row:
    """Tokens, targets (places, in one or two runs, sometimes none) and packed records of row `number`."""
    rng = np.random.default_rng([7, number])
    tokens = rng.integers(0, VOCAB, rng.integers(2, 30)).astype(np.int64)
    first = int(rng.integers(1, len(tokens) + 1))
    targets = np.arange(first, len(tokens))
    if number % 3 == 0 and len(targets) > 4:
        targets = np.delete(targets, 2)
    return tokens, targets, _POOL[method][rng.integers(0, len(_POOL[method]), len(targets))]


def write(
    path: Path, method: str = "topk", rows: int = 30, rank: int = 0, world: int = 1, pause: float = 0, **spec
) -> None:
    with CacheWriter(path, replace(SPECS[method], **spec), rank=rank, shard_bytes=1000) as writer:
        for number in range(rank, rows, world):
            tokens, targets, packed = make_row(method, number)
            if not writer.has(tokens, targets):
                writer.add(tokens, targets, packed)
                time.sleep(pause)


def finished(path: Path, method: str = "topk", rows: int = 30, **spec) -> TeacherCache:
    write(path, method, rows, **spec)
    finish_cache(path, replace(SPECS[method], **spec))
    return TeacherCache.open(path)


def check_row(cache: TeacherCache, method: str, number: int) -> None:
    tokens, targets, packed = make_row(method, number)
    row = cache.row(tokens, targets)
    np.testing.assert_array_equal(row.tokens, tokens)
    np.testing.assert_array_equal(row.targets, targets)
    np.testing.assert_array_equal(row.packed, packed)


def shards(path: Path) -> Iterator[Path]:
    yield from sorted(path.glob("shard-*.arrow"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--method", default="topk")
    parser.add_argument("--rows", type=int, default=30)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0)
    options = parser.parse_args()
    print(os.getpid(), flush=True)
    write(options.path, options.method, options.rows, options.rank, options.world, options.pause)
