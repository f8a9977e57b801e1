"""The memory that the CPU kernels keep."""

from __future__ import annotations

from .ops import extension


def empty_cache() -> int:
    """Frees the memory that CPU losses keep for their next gradient, and returns how many bytes that were.

    A gradient is as large as the logits, and writing fresh pages costs more time than the kernel. So the memory of a
    freed gradient (from 4 MiB on) is kept for the next one, at most `DISTILLM_CPU_CACHE_MIB` MiB in all (environment,
    read once; 1024 when not set, 0 keeps nothing). Kept memory counts as used in torch's profiler; on Linux the kernel
    takes its pages back when memory is short. Gradients in use are not touched. CUDA memory is torch's to keep.

    Example:
        >>> import torch, distillm_ext
        >>> student = torch.randn(64, 50257, requires_grad=True)
        >>> distillm_ext.forward_kl_loss(student, torch.randn(64, 50257)).backward()
        >>> student.grad = None
        >>> distillm_ext.empty_cache() > 0
        True
    """
    return extension.release_gradient_memory()
