"""The CUDA kernels of packed records, executed from their PTX by ptxsim: the bytes of the CPU, and back."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import packing_cases as cases
import ptxsim
import pytest
from packing_cases import CODECS, Case
from ptx_kernels import KERNELS, compiled
from tiers import full

ARCHITECTURES = ["sm_90", *full("sm_80")]


@cache
def layout_program(folder: Path) -> Path:
    program = folder / "record_layout"
    compiler = os.environ.get("CXX", "c++").split()
    subprocess.run([*compiler, "-std=c++17", str(KERNELS / "record_layout.cpp"), "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def layout_of(tmp_path_factory):
    """The RecordLayout that the launcher passes, as words."""
    program = layout_program(tmp_path_factory.mktemp("layout"))

    def words(case: Case, codec: str) -> list[np.uint32]:
        name, k, vocab, temperatures, labels, counts = case.settings(codec)
        numbers = [name, k, vocab, int(labels), int(counts), *temperatures]
        done = subprocess.run([program, *map(str, numbers)], capture_output=True, text=True, check=True)
        return [np.uint32(int(word)) for word in done.stdout.split()]

    return words


def field_pointers(case: Case) -> list[np.ndarray | None]:
    ids, logprobs, norm, tail, label, valid, counts = case.arrays()
    flat = [ids, logprobs, norm, tail, label, valid.view(np.uint8), counts]
    return [None if x is None else x.reshape(-1) for x in flat]


def launch(kernel: str, arguments: ptxsim.Struct, case: Case, arch: str, threads: int, readonly, **options):
    rows, k = case.ids.shape
    module = compiled("pack_logits.cu", arch)
    shared = 4 * (options.pop("words") + 2 * k)
    return module.launch(kernel, rows, threads, [arguments], shared_bytes=shared, readonly=readonly, **options)


def pack(case: Case, codec: str, layout_of, arch: str = "sm_90", threads: int = 64, **options) -> np.ndarray:
    layout, expected = layout_of(case, codec), case.pack(codec)
    packed = np.full(expected.size, 0xA5, np.uint8)
    fields = field_pointers(case)
    arguments = ptxsim.Struct(*layout, *fields, packed)
    readonly = [x for x in fields if x is not None]
    options["words"] = 8 * expected.shape[1] // 32 + 2
    launch("::pack_logits_kernel", arguments, case, arch, threads, readonly, **options)
    return packed.reshape(expected.shape)


def unpack(
    packed: np.ndarray, like: Case, codec: str, layout_of, arch="sm_90", threads=64, offset=0, **options
) -> Case:
    source = np.zeros(packed.size + offset, np.uint8)[offset:]  # any alignment
    source[:] = packed.reshape(-1)
    arrays = [None if x is None else np.full(x.shape, 7, x.dtype) for x in like.arrays()]
    back = Case(*arrays, like.vocab_size, like.temperatures)
    arguments = ptxsim.Struct(*layout_of(like, codec), source, *field_pointers(back))
    options["words"] = 8 * packed.shape[1] // 32 + 2
    launch("::unpack_logits_kernel", arguments, like, arch, threads, [source], **options)
    return back


def assert_same(got: Case, expected: Case) -> None:
    """Equal but for the rounding of exponentials, which may also swap entries that it makes tie."""
    np.testing.assert_array_equal(got.valid, expected.valid)
    np.testing.assert_array_equal(got.tail_logprob, expected.tail_logprob)
    np.testing.assert_allclose(got.log_norm, expected.log_norm, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, rtol=2e-6, atol=2e-6)
    kept, wanted = cases.by_id(got), cases.by_id(expected)
    assert kept.keys() == wanted.keys() and all(kept[place][1] == wanted[place][1] for place in wanted)
    np.testing.assert_array_equal(got.ids < 0, expected.ids < 0)
    resorted = cases.canonical(got)
    np.testing.assert_array_equal(got.ids, resorted.ids)
    if got.label_logprob is not None:
        np.testing.assert_array_equal(got.label_logprob, expected.label_logprob)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("codec", CODECS)
def test_bytes_of_the_cpu_and_back(arch, codec, layout_of):
    for seed, (vocab, k, method) in enumerate(
        [(1, 1, "topk"), (50, 64, "topk"), (1000, 2, "sample"), (3000, 37, "topk")]
    ):
        case = cases.make(6, vocab, k, method, labels=seed != 2, seed=seed)
        expected = case.pack(codec)
        for threads in (32, 96):
            packed = pack(case, codec, layout_of, arch, threads, seed=seed)
            np.testing.assert_array_equal(packed, expected)
        back = unpack(expected, case, codec, layout_of, arch, 64, offset=seed, seed=seed)
        wanted = case.unpack(expected, codec)
        if codec == "exact":
            for x, y in zip(back.arrays(), wanted.arrays(), strict=True):
                assert (x is None and y is None) or x.tobytes() == y.tobytes()
        else:
            assert_same(back, wanted)


@pytest.mark.parametrize("arch", ["sm_80", *full("sm_100", "sm_120")])
def test_other_architectures(arch, layout_of):
    case = cases.make(3, 1000, 16)
    np.testing.assert_array_equal(pack(case, "q8", layout_of, arch), case.pack("q8"))
    assert_same(unpack(case.pack("q8"), case, "q8", layout_of, arch), case.unpack(case.pack("q8"), "q8"))


def test_the_largest_k(layout_of):
    case = cases.make(1, 5000, 1024, temperatures=(1.0,))
    packed = case.pack("q8")
    np.testing.assert_array_equal(pack(case, "q8", layout_of, threads=256, seed=1), packed)
    assert_same(unpack(packed, case, "q8", layout_of, threads=256, seed=1), case.unpack(packed, "q8"))


@pytest.mark.parametrize("codec", CODECS)
def test_any_bytes_are_safe(codec, layout_of):
    """Random bytes: no access outside (ptxsim checks), the CPU's idea of what is an entry."""
    rng = np.random.default_rng(5)
    for vocab, k, method in ((300, 9, "topk"), (5, 2, "sample"), (151_936, 33, "sample")):
        case = cases.make(8, vocab, k, method, temperatures=(1.0, 3.0))
        packed = rng.integers(0, 256, case.pack(codec).shape, dtype=np.uint8)
        packed[0] = 255
        back, expected = unpack(packed, case, codec, layout_of), case.unpack(packed, codec)
        np.testing.assert_array_equal(back.valid, expected.valid)
        assert back.ids.min() >= -1 and back.ids.max() < vocab
        np.testing.assert_array_equal(np.sort(back.ids, -1), np.sort(expected.ids, -1))


def test_traffic(layout_of):
    """Packed bytes are read and written once."""
    case = cases.make(4, 151_936, 64, temperatures=(1.0,))
    packed = case.pack("q8")
    storage = packed.reshape(-1).copy()
    fields = field_pointers(case)
    shared = 4 * (8 * packed.shape[1] // 32 + 2 + 128)
    counters = compiled("pack_logits.cu", "sm_90").launch(
        "::unpack_logits_kernel", 4, 64, [ptxsim.Struct(*layout_of(case, "q8"), storage, *fields)], shared_bytes=shared
    )
    assert counters.load_bytes == packed.size
    assert counters.store_bytes == sum(x.nbytes for x in fields if x is not None)
