"""The arguments of the operator `linear_divergence`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LinearDivergenceCall(NamedTuple):
    """The operator's arguments in the order of its schema; `linear` documents and checks them.

    R rows, student hidden size H and vocabulary V, teacher Ht and Vt.
    """

    hidden: Tensor  # [R, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    teacher: Tensor | None  # [R, Ht] with a teacher_weight, else logits [R, Vt]; None and no ids: cross-entropy alone
    teacher_weight: Tensor | None  # [Vt, Ht]
    teacher_bias: Tensor | None  # [Vt]
    ids: Tensor | None  # [R, K]: of a compressed teacher, as the next four; `CompressedRows`
    logprobs: Tensor | None
    log_norm: Tensor | None
    tail_logprob: Tensor | None
    counts: Tensor | None
    labels: Tensor | None  # [R] int64
    row_weight: Tensor | None  # [R], the loss dtype, as alpha_rows and cap
    alpha_rows: Tensor | None
    cap: Tensor | None
    rows: Tensor | None  # int64, distinct: the only rows to look at
    scale: float
    softcap: float  # 0: none
    teacher_scale: float
    teacher_softcap: float
    divergence: str
    alpha: float
    beta: float
    temperature: float
    ce_weight: float
    ignore_index: int
    detach_mixture: bool
    tail: str  # of a compressed teacher, as the next
    teacher_vocab: int
    dtype: torch.dtype  # of the student's products
    chunk_rows: int  # 0: from the memory budget
    vocab_size: int  # entries of both sides to use; 0: all
    per_row: bool  # loss [R]; its gradients are formed in the backward pass
    need_ce: bool
    need_metrics: bool
    need_hidden: bool
    need_weight: bool
    need_bias: bool
