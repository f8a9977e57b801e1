"""The model as the decode loop calls it: out of its wrappers, in evaluation mode, logits of the last position only."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import GenerationMixin

from distillm_ext.generation.loop.cache import supports_rows
from distillm_ext.generation.loop.linears import few_rows_linears
from distillm_ext.generation.loop.lockstep import Lockstep, is_sharded


def unwrapped(model: nn.Module) -> Any:
    """The model inside DDP and `torch.compile`: neither has work to do in a forward pass without gradient, and compiled
    code would be rebuilt at every new length. FSDP's wrapper stays: it makes the weights whole."""
    inner: Any = model
    while True:
        if isinstance(inner, (DistributedDataParallel, DataParallel)):
            inner = inner.module
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        else:
            return inner


def check_no_virtual_tokens(model: Any, name: str) -> None:
    """Refuses a model whose adapter puts virtual tokens before the text: neither the decode loop nor a loss that calls
    the backbone itself would see them.

    Args:
        model: a model as it was built or loaded, whatever wraps it.
        name: of the argument, for the message.

    Raises:
        ValueError: prompt tuning, P-tuning, prefix tuning or another adapter of that kind.
    """
    configs = getattr(unwrapped(model), "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
        if getattr(config, "is_prompt_learning", False):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ValueError(
                f"{name}: its adapter ({kind}) puts virtual tokens before the prompt, which is not supported; use LoRA "
                "or another adapter of the weights"
            )


def base_of(inner: Any, name: str) -> Any:
    """The transformers model inside PEFT's, or what was given.

    Raises:
        TypeError: adapters of mixed kinds (`mixed=True`), or an adapter around an adapted model.
    """
    base: Any = inner.get_base_model() if hasattr(inner, "get_base_model") else getattr(inner, "module", inner)
    if hasattr(base, "get_base_model"):
        raise TypeError(
            f"{name}: an adapter stands around a model that has one already, which is not supported; merge the inner "
            "one (merge_and_unload), or add the outer one to it (add_adapter)"
        )
    if type(inner).__name__ == "PeftMixedModel":
        raise TypeError(f"{name}: adapters of mixed kinds (mixed=True) are not supported; use one kind, such as LoRA")
    return base


def causal_model(model: nn.Module) -> Any:
    """The transformers model inside whatever wraps it.

    Raises:
        TypeError: not a causal language model.
        ValueError: the adapter puts virtual tokens before the prompt.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a causal language model of transformers, got {type(model).__name__}")
    inner = unwrapped(model)
    check_no_virtual_tokens(inner, "model")
    causal = base_of(inner, "model")
    if not hasattr(causal, "config") or not hasattr(causal, "get_output_embeddings"):
        raise TypeError(f"model: expected a causal language model of transformers, got {type(model).__name__}")
    return causal


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off, gradient checkpointing with it; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _last_position(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0][:, -1:], *args[1:])


# What models call their cache of keys and values: transformers up to 5.23 says past_key_values, from 5.24 on cache.
_CACHE_ARGUMENTS = ("cache", "past_key_values")
# Models that find a token's place by the attention mask (ALiBi). Others that are not told positions count columns.
_PLACE_BY_MASK = ("bloom", "mpt")
# How else a model says that it can go on from what it has read.
_STATE_ARGUMENTS = ("use_cache", "cache_params", "state", "mems")


class CausalForward:
    """Calls a causal language model for the next token's logits.

    Args:
        model: a causal LM of transformers, bare, PEFT, or wrapped for distribution.
        group: the processes that share a sharded model; None is all.

    Attributes:
        causal: the transformers model inside its wrappers.
        config: the model's configuration.
        device: where its inputs go.
        takes_rows: whether it reads and writes a `RowCache`: keys and values, and nothing else, carry the past, and
            tokens are where they are told to be.
        keeps_state: whether a step needs only the newest token (otherwise it needs the whole text).

    Raises:
        TypeError: not a causal language model.
        ValueError: a model that neither takes a `RowCache` nor has a `generate` of its own, or one of RoBERTa's
            family.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
        causal = causal_model(model)
        if any(hasattr(module, "create_position_ids_from_input_ids") for module in causal.modules()):
            raise ValueError(
                f"model: {type(causal).__name__} numbers positions from its padding token on, which no generation with "
                "a cache does: its responses would be wrong; choose a decoder of another family"
            )
        self.model = unwrapped(model)
        self.config = causal.config
        self.device = causal.get_input_embeddings().weight.device
        self.lockstep = Lockstep(is_sharded(self.model), self.device, group)
        self.causal = causal
        self.head = causal.get_output_embeddings()
        self.accepts = set(inspect.signature(causal.forward).parameters)
        names = [name for name in _CACHE_ARGUMENTS if name in self.accepts]
        self.cache_argument = names[0] if names else None
        placed = "position_ids" in self.accepts or getattr(self.config, "model_type", None) in _PLACE_BY_MASK
        stateful = getattr(causal, "_is_stateful", False)
        caches = bool(names) and "use_cache" in self.accepts
        self.takes_rows = caches and placed and not stateful and supports_rows(self.config)
        self.keeps_state = bool(names) or any(name in self.accepts for name in _STATE_ARGUMENTS)
        if not self.takes_rows and not isinstance(causal, GenerationMixin):
            obstacle = "carries its past in more than keys and values"
            if not names:
                obstacle = "takes neither cache nor past_key_values"
            elif not placed:
                obstacle = "takes no position_ids"
            raise ValueError(
                f"model: {type(causal).__name__}.forward {obstacle}, so only transformers' own generate could run it, "
                "and it has none; derive the model from transformers' PreTrainedModel and GenerationMixin"
            )

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Evaluation mode, no gradient, linear layers for few rows; the head sees the last position where the model has
        no option for that."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluation_mode(self.model))
            stack.enter_context(few_rows_linears(self.model))
            if "logits_to_keep" not in self.accepts and self.head is not None:
                stack.callback(self.head.register_forward_pre_hook(_last_position).remove)
            yield

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor, cache: Any) -> Tensor:
        """[rows, V] logits of the token that follows.

        Args:
            input_ids: [rows, new] int64.
            attention_mask: [rows, columns of the cache + new], or None where nothing is padding.
            positions: [rows, new] int64, positions within each row's own text.
            cache: keys and values so far; extended.
        """
        # A balance of experts, from the logits of the new tokens and the mask of all tokens, would fail.
        options: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1, "output_router_logits": False}
        known = {name: value for name, value in options.items() if name in self.accepts}
        output = self.call(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=True, return_dict=True, **known,
            **{str(self.cache_argument): cache},
        )  # fmt: skip
        return output.logits[:, -1]

    def call(self, **inputs: Any) -> Any:
        """One forward pass of the wrapped model, announced to the other processes."""
        self.lockstep.tick()
        if "use_cache" not in self.accepts:
            inputs.pop("use_cache", None)  # transformers' generate says so to every model
        return self.model(**inputs)

    def keep_step(self) -> None:
        """Takes part in the forward passes of the other processes until all of them are done."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        options = {"attention_mask": torch.ones_like(token), "use_cache": False}
        known = {name: value for name, value in options.items() if name in self.accepts}
        while self.lockstep.others_go_on():
            self.model(input_ids=token, return_dict=True, **known)
