"""Cache of teacher logits: bytes per token by codec, and rows per second read in order and at random.

    python benchmarks/bench_cache.py [--rows 2000] [--length 512]

DistillKit publishes 344 bytes per token for its top-128 setting and 127 for top-50, at V = 152k. Rows per second come
from a cache of --rows sequences whose last three quarters are targets, one thread; "bytes" verifies and joins the
packed records, "unpacked" also decodes them. Files are in the page cache: the figures are those of the code, not of a
disk.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import Row, environment, publish

from distillm_ext import _codec  # noqa: PLC2701  (the compiled codec, imported without torch)
from distillm_ext.packing import CODECS, record_bytes
from distillm_ext.teacher import CacheSpec, CacheWriter, CompressionSettings, TeacherCache, finish_cache

DISTILLKIT = {(151_936, 128): 344, (151_936, 50): 127}


def sizes() -> list[Row]:
    rows = []
    for vocab in (49_152, 151_936):
        for k in (12, 32, 50, 64, 128):
            widths = {codec: record_bytes(codec, k=k, vocab_size=vocab) for codec in CODECS}
            sample = record_bytes("q8", k=k, vocab_size=vocab, method="sample")
            published = DISTILLKIT.get((vocab, k), "")
            rows.append({"vocab": vocab, "k": k, **widths, "q8 sample": sample, "DistillKit": published})
    return rows


def fill(path: Path, spec: CacheSpec, rows: int, length: int) -> list[np.ndarray]:
    """Sequences with records of random distributions (a few, repeated: packing is not what is measured)."""
    rng, kept = np.random.default_rng(0), spec.compression
    ids = np.stack([np.sort(rng.choice(kept.vocab_size, kept.k, replace=False)) for _ in range(64)]).astype(np.int32)
    z = -np.sort(rng.exponential(1.0, (64, kept.k)).cumsum(-1) / 8, -1).astype(np.float32)
    z -= np.log(np.exp(z).sum(-1, keepdims=True) / 0.95).astype(np.float32)
    zeros, valid = np.zeros((64, 1), np.float32), np.ones(64, bool)
    tail = np.full((64, 1), np.log(0.05), np.float32)
    pool = _codec.pack_logits(ids, z, zeros, tail, zeros[:, 0].copy(), valid, None, kept.vocab_size, (1.0,), kept.codec)
    sequences = [rng.integers(0, kept.vocab_size, length).astype(np.int32) for _ in range(rows)]
    with CacheWriter(path, spec) as writer:
        for tokens in sequences:
            writer.add(tokens, length // 4, pool[rng.integers(0, 64, length - length // 4)])
    finish_cache(path, spec)
    return sequences


def rate(function, count: int, rounds: int = 3) -> float:
    """Calls of `function` per second, the best of several rounds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for index in range(count):
            function(index)
        best = min(best, time.perf_counter() - start)
    return count / best


def speeds(rows: int, length: int) -> list[Row]:
    table = []
    for codec in ("q4", "q8"):
        with tempfile.TemporaryDirectory() as folder:
            spec = CacheSpec(CompressionSettings(151_936, 64, codec=codec))
            start = time.perf_counter()
            sequences = fill(Path(folder), spec, rows, length)
            written = rows / (time.perf_counter() - start)
            start = time.perf_counter()
            cache = TeacherCache.open(folder)
            opened = time.perf_counter() - start
            order = np.random.default_rng(1).permutation(rows)
            table.append(
                {
                    "codec": codec,
                    "rows": rows,
                    "tokens/row": length,
                    "bytes/position": sum(s.bytes for s in cache.manifest.shards) / cache.manifest.positions,
                    "written/s": written,
                    "open ms": 1e3 * opened,
                    "bytes in order/s": rate(lambda i, c=cache: c[i], rows),
                    "bytes at random/s": rate(lambda i, c=cache, s=sequences, o=order: c.packed(s[o[i]]), rows),
                    "unpacked/s": rate(lambda i, c=cache, s=sequences, o=order: c.lookup(s[o[i]]), min(rows, 100)),
                }
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    publish("Bytes per token, one temperature, with label", sizes(), "cache_bytes.csv")
    info = environment()
    publish(f"Rows per second ({info['cpu']}, 1 thread)", speeds(options.rows, options.length), "cache_speed.csv")


if __name__ == "__main__":
    main()
