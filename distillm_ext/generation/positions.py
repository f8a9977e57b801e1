"""How long a text may be for a model, and what is refused or stopped there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distillm_ext.generation.forward import causal_model

# What configurations call the number of positions; most alias theirs to the first. Models without an entry (ALiBi,
# recurrent ones) have no limit.
_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_target_positions", "n_ctx")


def position_limit(config: Any) -> int | None:
    """Most tokens of a text that a model was built for, or None.

    Rotary embeddings that are stretched by `rope_scaling` count their stretched length: that is what the configuration
    holds. Learned embeddings with places before the first token (OPT) do not count those.

    Example:
        >>> position_limit(transformers.GPT2Config())
        1024
    """
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for name in _NAMES:
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def limits_within(limits: Sequence[int], lengths: Sequence[int], most: int | None, what: str) -> list[int]:
    """Most new tokens of each row, such that prompt and new tokens stay within `most` tokens.

    Args:
        limits: most new tokens of each row otherwise.
        lengths: of the prompts.
        most: tokens of prompt and response together; None is no limit.
        what: holds the limit, for the message.

    Raises:
        ValueError: a prompt that leaves no room for a token.
    """
    if most is None:
        return list(limits)
    for row, length in enumerate(lengths):
        if length >= most:
            raise ValueError(
                f"prompts[{row}]: its {length} tokens leave no room for a new one within {what} ({most}); shorten it"
            )
    return [min(limit, most - length) for limit, length in zip(limits, lengths, strict=True)]


def check_positions(models: Mapping[str, Any], max_length: int, *, setting: str = "max_length") -> None:
    """Refuses a run whose texts may be longer than one of its models can read.

    Args:
        models: by the name that the message gives them; None is skipped.
        max_length: most tokens of prompt and response.
        setting: what the message calls it.

    Raises:
        ValueError: names the model, its limit and the setting.

    Example:
        >>> check_positions({"student": student, "teacher": teacher}, args.max_length)
    """
    for name, model in models.items():
        limit = None if model is None else position_limit(causal_model(model).config)
        if limit is not None and max_length > limit:
            raise ValueError(
                f"{setting}: expected at most {limit}, the positions that the {name} has ({type(causal_model(model)).__name__}"
                f"), got {max_length}; lower {setting}, or take a model for longer texts"
            )
