"""Gradients on the CPU live in memory of earlier gradients: no two at once, nothing of the old left, bounded."""

import copy
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import distillm_ext
from distillm_ext import compress_logits, distillation_loss

MIB = 2**20


@pytest.fixture(autouse=True)
def _nothing_kept():
    distillm_ext.empty_cache()
    yield
    distillm_ext.empty_cache()


def pair(rows: int = 48, vocab: int = 32000, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, vocab, generator=generator).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def gradient(student, teacher, **options):
    return torch.autograd.grad(distillation_loss(student, teacher, reduction="sum", **options), student)[0]


def test_a_freed_gradient_is_the_next_ones_memory():
    student, teacher = pair()
    first = gradient(student, teacher)
    address, expected = first.data_ptr(), first.clone()
    del first
    again = gradient(student, teacher)
    assert again.data_ptr() == address
    assert torch.equal(again, expected)


def test_gradients_in_use_share_nothing():
    student, teacher = pair()
    first = gradient(student, teacher)
    expected = first.clone()
    other = gradient(student, teacher, divergence="reverse_kl")
    assert other.data_ptr() != first.data_ptr()
    assert torch.equal(first, expected)


def test_a_view_keeps_the_memory_in_use():
    student, teacher = pair()
    view = gradient(student, teacher)[3]
    expected = view.clone()
    gradient(student, teacher, divergence="reverse_kl")
    assert torch.equal(view, expected)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_old_gradient_shows(dtype, sparse):
    student, teacher = pair(96, dtype=dtype)
    dirty = torch.autograd.grad((distillation_loss(student, teacher, reduction="sum") * 1e4), student)[0]
    address = dirty.data_ptr()
    del dirty
    labels = torch.zeros(96, dtype=torch.int64)
    labels[::3] = -100
    target = compress_logits(teacher[:, :31000], 8) if sparse else teacher[:, :31000]
    found = gradient(student, target, labels=labels, vocab_size=30000 if not sparse else None)
    assert found.data_ptr() == address
    assert (found[::3] == 0).all()
    assert (found[1::3] != 0).any()
    if not sparse:
        assert (found[:, 30000:] == 0).all()


def test_batches_of_nearby_lengths_share_a_block():
    addresses = set()
    for rows in (91, 96, 93, 95):
        found = gradient(*pair(rows))
        addresses.add(found.data_ptr())
        del found
    assert len(addresses) == 1


def test_a_large_gradient_does_not_fit_a_small_block():
    small = gradient(*pair(48))
    address = small.data_ptr()
    del small
    student, teacher = pair(100)
    found = gradient(student, teacher, divergence="forward_kl")
    assert found.data_ptr() != address
    assert torch.allclose(found, student.detach().softmax(-1) - teacher.softmax(-1), atol=1e-6)


def test_a_small_gradient_leaves_a_large_block_alone():
    large = gradient(*pair(400))
    address = large.data_ptr()
    del large
    assert gradient(*pair(48)).data_ptr() != address


def test_shape_and_strides_of_three_dimensions():
    student, teacher = (x.detach().view(4, 12, 32000) for x in pair())
    found = gradient(student.requires_grad_(), teacher)
    assert found.shape == (4, 12, 32000)
    assert found.is_contiguous()
    assert found.dtype == torch.float32


def test_empty_cache_frees_and_counts():
    found = gradient(*pair())
    size = found.numel() * found.element_size()
    assert distillm_ext.empty_cache() == 0
    del found
    assert size <= distillm_ext.empty_cache() <= size * 1.2
    assert distillm_ext.empty_cache() == 0


def test_small_gradients_are_not_kept():
    gradient(*pair(4))
    assert distillm_ext.empty_cache() == 0


def test_the_profiler_sees_the_memory():
    student, teacher = pair()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        gradient(student, teacher)
    sizes = [event.nbytes() for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(sizes) >= student.numel() * 4


def test_a_gradient_can_be_copied_and_sent():
    found = gradient(*pair())
    assert torch.equal(copy.deepcopy(found), found)
    shared = found.clone().share_memory_()
    assert torch.equal(shared, found)
    expected = found.clone()
    found.share_memory_()
    assert torch.equal(found, expected)


def test_threads_get_their_own():
    failures = []

    def work(seed: int) -> None:
        student, teacher = pair(seed=seed)
        expected = student.detach().softmax(-1) - teacher.softmax(-1)
        for _ in range(8):
            if not torch.allclose(gradient(student, teacher, divergence="forward_kl"), expected, atol=1e-6):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


PROBE = """
import torch, distillm_ext
for rows in {rows}:
    student = torch.randn(rows, 32000, requires_grad=True)
    distillm_ext.forward_kl_loss(student, torch.randn(rows, 32000)).backward()
    student.grad = None
print(distillm_ext.empty_cache())
"""


def kept(limit: str, rows: list[int]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "DISTILLM_CPU_CACHE_MIB": limit}
    probe = [sys.executable, "-c", PROBE.format(rows=rows)]
    return subprocess.run(probe, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_nothing_is_kept_under_a_limit_of_zero():
    assert int(kept("0", [64]).stdout) == 0


def test_the_limit_holds_and_the_newest_stays():
    # 8, 20 and 40 MiB under a limit of 48: the two oldest go.
    found = int(kept("48", [66, 164, 328]).stdout)
    assert 40 * MIB <= found <= 48 * MIB


def test_a_wrong_limit_is_named():
    found = kept("plenty", [64])
    assert found.returncode != 0
    assert "DISTILLM_CPU_CACHE_MIB must be a whole number of MiB" in found.stderr
    assert "plenty" in found.stderr
