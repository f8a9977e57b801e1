"""Other projects' losses on logits, where they have the divergence and run on the device.

TRL: `generalized_jsd_loss` of its GKD trainer. Liger-Kernel: Triton kernels, which need a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import baselines
from torch import Tensor

TRL_BETA = {"forward_kl": 0.0, "generalized_js": baselines.JS, "reverse_kl": 1.0}
Loss = Callable[[Tensor], Tensor]


def trl(divergence: str, teacher: Tensor) -> Loss | None:
    if divergence not in TRL_BETA or importlib.util.find_spec("trl") is None:
        return None
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    beta = TRL_BETA[divergence]
    return lambda logits: GKDTrainer.generalized_jsd_loss(logits[None], teacher[None], beta=beta)


def liger(divergence: str, teacher: Tensor) -> Loss | None:
    if not teacher.is_cuda or importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss

    if divergence == "forward_kl":
        kl = LigerKLDIVLoss(reduction="batchmean")
        return lambda logits: kl(logits.float().log_softmax(-1), teacher.float().softmax(-1))
    if divergence == "generalized_js":
        js = LigerJSD(beta=baselines.JS)
        return lambda logits: js(logits.float().log_softmax(-1), teacher.float().log_softmax(-1))
    return None
