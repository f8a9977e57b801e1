"""What can be wrong with a cache of teacher logits."""

from __future__ import annotations


class CacheError(ValueError):
    """A cache that cannot be used as it is; the message says why and what to do."""


class CacheDamaged(CacheError):
    """Bytes are missing or not what was written."""


class CacheMismatch(CacheError):
    """The cache was made for another teacher, tokenizer or data set, or with other settings."""


class CacheMiss(KeyError):
    """The cache has no row for these tokens."""

    def __str__(self) -> str:  # KeyError would print the representation
        return str(self.args[0])
