"""The other way of decoding: transformers' own `generate`, for models whose past is more than keys and values.

Recurrent and convolutional layers, chunked attention and the like carry states that only the model itself can prepare
and pass on, and that a padding token would change for good. So prompts of one length go together, nothing is padded,
and `model.generate` runs them with this package's draw in place of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from distillm_ext.generation.loop.batching import equal_length_groups
from distillm_ext.generation.loop.forward import CausalForward
from distillm_ext.generation.loop.progress import DrawnTokens
from distillm_ext.generation.request import Request

# transformers' RWKV adds the states of all rows to every row of a step (a missing dimension): one row at a time.
_ONE_ROW = ("rwkv",)


class Draw(LogitsProcessor):
    """Draws a token per row and leaves `generate` no other choice.

    Args:
        request: what to generate.
        rows: [n] int64, the rows of the request that are in the batch.
        record: where tokens go.
    """

    def __init__(self, request: Request, rows: Tensor, record: DrawnTokens) -> None:
        self.request, self.rows, self.record = request, rows, record
        self.age = torch.zeros_like(rows)
        self.going = torch.ones_like(rows, dtype=torch.bool)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """[n, V] scores: 0 at the token drawn, −inf elsewhere."""
        drawn, ended, more = self.request.draw(scores, self.rows, self.age)
        self.record.add(self.rows, self.age, drawn, self.going, ended)
        self.going, self.age = self.going & more, self.age + 1
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn.tokens.unsqueeze(1), 0.0)


class Done(StoppingCriteria):
    """Tells `generate` which rows are done."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """[n] bool."""
        return ~self.draw.going


def routed(causal: Any, call: Callable[..., Any]) -> Any:
    """The same model, its calls led through `call`, without generation settings of its own.

    `generate` calls the model it belongs to. A wrapper around that model (PEFT, FSDP) has to be called instead, and
    other processes told of it. The view shares modules and parameters with `causal`, and leaves it as it is.
    """
    kind = type(causal)
    # Made without the class's own `__new__`: that of FSDP2 builds a model anew.
    view: Any = object.__new__(
        type(kind.__name__, (kind,), {"__call__": lambda self, *args, **inputs: call(*args, **inputs)})
    )
    view.__dict__.update(causal.__dict__)
    view.generation_config = GenerationConfig()
    return view


class HfLoop:
    """Generates all rows of a request, one group of equally long prompts after the other.

    Args:
        forward: the model.
        request: what to generate.
        slots: most rows in a group.
        record: where tokens go.
    """

    def __init__(self, forward: CausalForward, request: Request, slots: int, record: DrawnTokens) -> None:
        self.request, self.record = request, record
        self.slots = 1 if getattr(forward.config, "model_type", None) in _ONE_ROW else slots
        self.causal = forward.causal
        self.model = routed(forward.causal, forward.call)
        self.settings = GenerationConfig(
            max_new_tokens=record.width, do_sample=False, use_cache=forward.keeps_state, pad_token_id=0
        )

    def run(self) -> None:
        """Until every row is done."""
        for first, last in equal_length_groups(self.request.lengths, self.slots):
            rows = torch.arange(first, last, device=self.request.prompts.device)
            ids = self.request.prompts[first:last, -self.request.lengths[first] :]
            draw = Draw(self.request, rows, self.record)
            self._forget(len(ids))
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self.settings,
                logits_processor=LogitsProcessorList([draw]),
                stopping_criteria=StoppingCriteriaList([Done(draw)]),
                # Processes keep step by `Lockstep`: they differ in the number of groups, not in that of tokens alone.
                synced_gpus=False,
            )

    def _forget(self, rows: int) -> None:
        """Clears states that a model keeps in its modules (RecurrentGemma): it takes a prompt of one token for a step
        that goes on from the last call."""
        clear = getattr(self.causal, "_setup_cache", None)
        if clear is not None:
            clear(self.causal.config, rows, self.request.prompts.device, self.causal.dtype)
