"""The weights of a trained model as its checkpoint names them, adapters merged, for an engine with a copy of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from distillm_ext.generation.loop.forward import causal_model, unwrapped

# Modules around another one that has the same place in the checkpoint.
_TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module")


@torch.no_grad()
def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a trained model under the names of its checkpoint, one at a time, tied ones once.

    The weights of adapters (PEFT) are those of the merged model: a layer's adapters are merged into a copy of that
    layer, so the trained model stays bit for bit what it is. Sharded parameters are gathered: every process must
    iterate.

    Args:
        model: a causal LM of transformers, bare, PEFT, or wrapped for distribution (DDP, FSDP2, `torch.compile`).

    Yields:
        (name, tensor); a tensor need not outlive the step to the next one.

    Raises:
        ValueError: an adapter that cannot be merged, a quantised weight, or parameters sharded by FSDP1 or DeepSpeed
            ZeRO-3; the message names it.

    Example:
        >>> engine.update_weights(full_weights(peft_model))
    """
    inner = unwrapped(model)
    causal = causal_model(inner)
    _check_sharding(inner)
    _check_adapters(inner)
    seen: set[int] = set()
    for group in _groups(list(_places(causal, ""))):
        for name, parameter in group.weights():
            # The copies of a group live as long as it does: no other object can have got the number of one.
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if not (parameter.is_floating_point() or parameter.is_complex()):
                raise ValueError(
                    f"weights: {name} is quantised ({parameter.dtype}), which has no value under its name for an "
                    "engine to take; train a model that is not quantised, or generate with the model itself"
                )
            yield name, _whole(parameter)
        seen -= group.copies


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def _check_sharding(model: nn.Module) -> None:
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError("weights: parameters sharded by FSDP1 have no names of their own; use FSDP2 (fsdp_version: 2)")
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError("weights: parameters sharded by DeepSpeed ZeRO-3 are not gathered; use ZeRO-2, or FSDP2")


def _check_adapters(inner: Any) -> None:
    """Refuses adapters that are no change of weights."""
    if not hasattr(inner, "get_base_model"):
        return
    tuner, kinds = inner.base_model, sorted({_kind(config) for config in inner.peft_config.values()})
    if not hasattr(tuner, "merge_and_unload") or "XLORA" in kinds:  # X-LoRA weighs its adapters by the input
        raise ValueError(f"weights: the adapter {', '.join(kinds)} cannot be merged into the model's weights; use LoRA")
    if hasattr(tuner, "_check_merge_allowed"):
        try:
            tuner._check_merge_allowed()
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"weights: the adapter {', '.join(kinds)} cannot be merged: {error}") from error


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _is_adapted(module: Any) -> bool:
    """Whether PEFT has put the module in another one's place."""
    return hasattr(module, "unload_and_optionally_merge_module") or (
        hasattr(module, "get_base_layer") and hasattr(module, "merge")
    )


@dataclass
class Place:
    """A module with parameters of its own, or an adapted one with all that is within.

    Attributes:
        name: of the module in the checkpoint, with a dot behind it (empty for the model itself).
        module: what is there.
        adapted: whether PEFT put it there.
    """

    name: str
    module: Any
    adapted: bool

    def base(self) -> list[Tensor]:
        """Parameters of the checkpoint that are here, before any merge."""
        if not self.adapted:
            return [parameter for parameter in self.module._parameters.values() if parameter is not None]
        return list(self._base_module().parameters())

    def _base_module(self) -> Any:
        original = getattr(self.module, "original_module", None)
        return self.module.get_base_layer() if original is None else original

    def merged(self, memo: dict[int, Any]) -> Iterator[tuple[str, Tensor]]:
        """Parameters after the merge, in copies. `memo` is `copy.deepcopy`'s: what places share, their copies share."""
        if not self.adapted:
            for name, parameter in self.module.named_parameters(recurse=False):
                yield self.name + name, copy.deepcopy(parameter, memo)
            return
        place = Place(self.name, copy.deepcopy(self.module, memo), True)
        try:
            found = place._merge()
        except (NotImplementedError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"weights: the adapter of {self.name[:-1]} ({type(self.module).__module__}."
                f"{type(self.module).__name__}) cannot be merged: {error or type(error).__name__}"
            ) from error
        for name, parameter in found.named_parameters():
            yield self.name + name, parameter

    def _merge(self) -> Any:
        if self.module.disable_adapters:
            return self._base_module()
        if hasattr(self.module, "unload_and_optionally_merge_module"):
            return self.module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        self.module.merge()
        return self.module.get_base_layer()


@dataclass
class Group:
    """Places that share parameters, of which one at least is adapted; or a single place that is not.

    A merge writes into the base layer's weight, so it reaches whoever is tied to it.
    """

    places: list[Place] = field(default_factory=list)
    copies: set[int] = field(default_factory=set)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, parameter of the merged model)."""
        if not any(place.adapted for place in self.places):
            for place in self.places:
                for name, parameter in place.module.named_parameters(recurse=False):
                    yield place.name + name, parameter
            return
        tensors = {id(p): p for place in self.places for p in (*place.module.parameters(), *place.base())}
        memo = {
            key: nn.Parameter(_whole(p), requires_grad=False) for key, p in tensors.items() if isinstance(p, DTensor)
        }
        # All merges before the first value: a later one may still change a weight that is shared.
        merged = [pair for place in self.places for pair in place.merged(memo)]
        self.copies = {id(parameter) for _, parameter in merged}
        yield from merged


def _places(module: nn.Module, prefix: str) -> Iterator[Place]:
    if _is_adapted(module):
        yield Place(prefix, module, True)
        return
    if any(parameter is not None for parameter in module._parameters.values()):
        yield Place(prefix, module, False)
    for name, child in module.named_children():
        yield from _places(child, prefix if name in _TRANSPARENT else f"{prefix}{name}.")


def _groups(places: list[Place]) -> Iterator[Group]:
    """Places in their order, those that share parameters with an adapted one together with the first of them."""
    tied = {id(parameter) for place in places if place.adapted for parameter in place.base()}
    of_parameter: dict[int, Group] = {}
    groups: list[Group] = []
    for place in places:
        shared = [id(parameter) for parameter in place.base() if id(parameter) in tied]
        known = next((of_parameter[key] for key in shared if key in of_parameter), None)
        if known is None:
            groups.append(known := Group())
        known.places.append(place)
        of_parameter.update(dict.fromkeys(shared, known))
    yield from groups
