"""The language-model head at chosen positions only: prompts and padding never meet a vocabulary-sized matrix.

A causal LM is split into its backbone (ids → hidden states) and its head (hidden states → logits). Some architectures
transform the head's output (`HeadTransform`). Whether the split reproduces the model's own logits is checked on a few
tokens at start; where it does not, the full logits are computed and a warning says so.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distillm_ext.compressed_logits import CompressedLogits
from distillm_ext.containers import LinearHead

logger = logging.getLogger(__name__)

_SCALE_MULTIPLIES = ("cohere", "cohere2", "cohere2_moe")
_SCALING_DIVIDES = ("granite", "granitemoe", "granitemoehybrid", "granitemoeshared", "granite_swa", "granitemoe_swa")
_SCALING_MULTIPLIES = ("hyperclovax",)


@dataclass(frozen=True)
class HeadTransform:
    """logits = softcap · tanh(scale · z / softcap), or scale · z without a softcap; z is the head's output.

    Attributes:
        scale: factor on the head's output.
        softcap: bound of the logits (Gemma 2), or None.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def head_transform(config: Any) -> HeadTransform:
    """The transform that the architecture named by `config.model_type` applies behind its head."""
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    model_type = getattr(config, "model_type", "")
    scale = 1.0
    if model_type in _SCALE_MULTIPLIES:
        scale = float(config.logit_scale)
    elif model_type in _SCALING_DIVIDES:
        scale = 1.0 / float(config.logits_scaling)
    elif model_type in _SCALING_MULTIPLIES:
        scale = float(config.logits_scaling)
    return HeadTransform(scale, getattr(config, "final_logit_softcapping", None))


@dataclass(frozen=True)
class TokenBatch:
    """What a forward pass needs.

    Attributes:
        input_ids, attention_mask: [B, S].
        positions: [R] flat positions b·S + t whose logits are wanted.
    """

    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any]) -> TokenBatch:
        """Picks the three tensors from a collated batch."""
        return cls(inputs["input_ids"], inputs["attention_mask"], inputs["positions"])

    def select(self, values: Tensor) -> Tensor:
        """[B, S, width] → [R, width]: the wanted positions."""
        return values.flatten(0, 1).index_select(0, self.positions.to(values.device))


# What a loss reads of a model at R positions: logits [R, V], or what they are made of.
StudentOutput = Tensor | LinearHead
# What it reads of a teacher: that, or what was kept of its logits.
TeacherOutput = StudentOutput | CompressedLogits
_HEAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fusion_obstacle(head: Any) -> str | None:
    """Why a loss cannot take over the product of this head, or None where it can."""
    if type(head).forward is not nn.Linear.forward:
        return f"its head is a {type(head).__name__}, not a plain torch.nn.Linear"
    if "forward" in head.__dict__:
        return "the forward of its head is replaced (hooks that move weights do that)"
    if _foreign_hooks(head):
        return "its head has forward hooks, which expect the logits of the whole head"
    if type(head.weight) not in (Tensor, nn.Parameter) and not hasattr(head.weight, "device_mesh"):
        return f"its head's weight is a {type(head.weight).__name__}, not a plain tensor"
    if head.weight.dtype not in _HEAD_DTYPES:
        return f"its head holds {head.weight.dtype} weights"
    return None


def _foreign_hooks(head: nn.Module) -> bool:
    """Whether others than torch's own wrappers (FSDP gathers the weight so) hook into the head's forward pass."""
    hooks = (*head._forward_pre_hooks.values(), *head._forward_hooks.values())
    return any(not (getattr(hook, "__module__", None) or "").startswith("torch.distributed") for hook in hooks)


def head_logits(head: LinearHead) -> Tensor:
    """[R, V] logits in the head's own dtype, whatever the autocast context."""
    with torch.autocast(head.hidden.device.type, enabled=False):
        return HeadTransform(head.scale, head.softcap)(nn.functional.linear(head.hidden, head.weight, head.bias))


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Replaces `module.forward` and yields the one that was there.

    Accelerate keeps its autocast wrapper as an attribute of the instance: it is put back, not deleted.
    """
    own = module.__dict__.get("forward")
    before = module.forward
    module.forward = forward
    try:
        yield before
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.forward = own


class LogitReader:
    """Logits of a causal LM at chosen positions.

    Args:
        model: causal LM, not wrapped for distribution; may be a PEFT model.

    Attributes:
        head: the output embedding, or None.
        splits: whether backbone and head are used apart. `verify` clears it where that would not be exact.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.head: Any = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
        self.backbone: Any = getattr(causal, "base_model", None)
        self.transform = head_transform(causal.config)
        self.splits = self.head is not None and self.backbone is not None and self.backbone is not causal
        self._reported = False
        # Logits alone are wanted: the balance of a router's experts costs time, and fails on a cache's masks.
        quiet = "output_router_logits" in inspect.signature(causal.forward).parameters
        self._options = {"output_router_logits": False} if quiet else {}

    def apart(self) -> bool:
        """Whether backbone and head may be called apart: a hook on the head expects the logits of a whole call."""
        return self.splits and not _foreign_hooks(self.head)

    def fuses(self) -> bool:
        """Whether a loss may take hidden states and head instead of logits. Logs the reason once where not."""
        obstacle = fusion_obstacle(self.head) if self.splits else "backbone and head are not used apart"
        if obstacle is not None and not self._reported:
            self._reported = True
            logger.warning(
                "%s: the loss is not fused with the head and needs the logits of all targets at once: %s",
                type(self.model).__name__, obstacle,
            )  # fmt: skip
        return obstacle is None

    def hidden(self, batch: TokenBatch) -> Tensor:
        """[R, H] hidden states before the head."""
        output = self.backbone(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, return_dict=True
        )
        return batch.select(output.last_hidden_state)

    def full(self, batch: TokenBatch, forward: Any) -> Tensor:
        """[R, V] logits from the model's own forward pass, which computes them at every position."""
        output = forward(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, return_dict=True,
            **self._options,
        )  # fmt: skip
        return batch.select(output.logits)

    def logits(self, batch: TokenBatch) -> Tensor:
        """[R, V] logits, by the cheaper way that is exact for this model."""
        if not self.splits:
            return self.full(batch, self.model)
        return self.transform(self.head(self.hidden(batch)))

    def column_logits(self, batch: TokenBatch) -> Tensor:
        """`logits`; a model that is not used in parts computes them at no other columns than those of the positions.

        Finding these out waits for the device: for evaluation, not for training.
        """
        if self.apart():
            return self.logits(batch)
        if "logits_to_keep" not in inspect.signature(self.model.forward).parameters:
            return self.full(batch, self.model)
        length = batch.input_ids.shape[1]
        columns, place = (batch.positions % length).unique(return_inverse=True)
        logits = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, return_dict=True,
            logits_to_keep=columns, **self._options,
        ).logits  # fmt: skip
        return logits[(batch.positions // length).to(logits.device), place.to(logits.device)]

    @torch.no_grad()
    def verify(self, token_ids: Sequence[int], name: str) -> bool:
        """Compares a few reconstructed logits with the model's own; on a mismatch switches to full logits.

        Args:
            token_ids: a legal input of a few tokens.
            name: what to call the model in the log ("student", "teacher").

        Returns:
            Whether backbone and head are used apart.
        """
        if not self.splits:
            logger.warning("%s: %s has no separate backbone and head; computing full logits", name, type(self.model))
            return False
        device = next(self.model.parameters()).device
        ids = torch.tensor([list(token_ids)], device=device)
        batch = TokenBatch(ids, torch.ones_like(ids), torch.arange(ids.shape[1], device=device))
        was_training = self.model.training
        self.model.eval()
        expected, found = self.full(batch, self.model), self.logits(batch)
        self.model.train(was_training)
        # Both run the same kernels on the same input; the slack is for a transform done in another precision.
        tolerance = 1e-4 if expected.dtype == found.dtype == torch.float32 else 2e-2
        self.splits = expected.shape == found.shape and torch.allclose(
            found.to(expected.device).float(), expected.float(), rtol=tolerance, atol=tolerance, equal_nan=True
        )
        if not self.splits:
            logger.warning(
                "%s: logits rebuilt from the hidden states of %s differ from the model's own; computing full logits at "
                "every position (slower, same result)", name, type(self.model).__name__,
            )  # fmt: skip
        return self.splits
