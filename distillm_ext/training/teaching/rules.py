"""Which losses can be had from compressed teacher logits, and which data policies from a cache of them alone."""

from __future__ import annotations

from distillm_ext.checks.compressed import SAMPLED_DIVERGENCES, SPARSE_DIVERGENCES
from distillm_ext.checks.options import TAILS

REUSE_METHODS = ("off", "topk", "sample")


def tail_of(tail: str | None, method: str) -> str:
    """How entries that were not kept count: as configured, else as the method of compression suggests."""
    if tail is not None:
        return tail
    return "sampled" if method == "sample" else "bucket"


def check_compressed_loss(
    divergence: str, *, alpha: float | None, tail: str | None, temperature: float, method: str
) -> None:
    """Refuses a loss that has no form on logits compressed by `method`.

    Raises:
        ValueError: names the configuration field and the reason.
    """
    if divergence not in SPARSE_DIVERGENCES:
        raise ValueError(
            f"divergence: {divergence!r} needs all of the teacher's logits; from compressed ones "
            f"(reuse_teacher_logits, or a cache) there are {', '.join(SPARSE_DIVERGENCES)}"
        )
    wanted = tail_of(tail, method)
    if wanted not in TAILS:
        raise ValueError(f"tail: expected one of {', '.join(TAILS)} or None; got {tail!r}")
    if wanted != "sampled":
        return
    if method != "sample":
        raise ValueError(
            "tail: 'sampled' weighs entries by how often they were drawn, and logits compressed with method 'topk' "
            "were not drawn; set reuse_teacher_logits='sample' (or capture with --method sample), or another tail"
        )
    if divergence not in SAMPLED_DIVERGENCES or (divergence == "skew_reverse_kl" and alpha == 0):
        raise ValueError(
            f"divergence: {divergence!r}{' with alpha 0' if divergence == 'skew_reverse_kl' else ''} has no unbiased "
            f"form from sampled entries; those with one are {', '.join(SAMPLED_DIVERGENCES)}. Or set tail='bucket'"
        )
    if temperature != 1:
        raise ValueError(
            f"temperature: must be 1 with sampled teacher logits, which were drawn at 1 and say nothing unbiased about "
            f"another; got {temperature!r}. Or set tail='bucket'"
        )


def check_cache_policy(policy: str) -> None:
    """Refuses a policy that trains on sequences which no cache can have seen.

    Raises:
        ValueError: names the field and the remedy.
    """
    if policy == "dataset":
        return
    who = "the teacher" if policy == "teacher_responses" else "the student"
    raise ValueError(
        f"policy: {policy!r} trains on responses that {who} writes during the run, which no cache holds; set "
        "policy='dataset', or give a teacher model beside the cache (teacher_cache=..., in YAML "
        "teacher: {name: ..., cache: ...})"
    )
