"""The teacher's output, captured once: the cache of compressed logits on disk.

Needs pyarrow (``pip install distillm_ext[train]``), and torch only where tensors are asked for: data-loader workers can
read packed bytes without importing it.
"""

from .cache import CacheRow, TeacherCache
from .errors import CacheDamaged, CacheError, CacheMismatch, CacheMiss
from .fingerprint import fingerprint_dataset, fingerprint_model, fingerprint_tokenizer
from .manifest import CacheSpec
from .settings import CompressionSettings
from .writer import CacheWriter, finish_cache

__all__ = [
    "CacheDamaged",
    "CacheError",
    "CacheMismatch",
    "CacheMiss",
    "CacheRow",
    "CacheSpec",
    "CacheWriter",
    "CompressionSettings",
    "TeacherCache",
    "finish_cache",
    "fingerprint_dataset",
    "fingerprint_model",
    "fingerprint_tokenizer",
]
