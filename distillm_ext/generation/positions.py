"""How long a text may be for a model, and what is refused or stopped there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distillm_ext.generation.loop.forward import causal_model

# What configurations call the number of positions; most alias theirs to the first. Models without an entry (ALiBi,
# recurrent ones) have no limit.
_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
    "n_ctx",
)
_TOKEN_COLUMNS = {"input_ids", "loss_mask", "prompt_length"}
_ROWS_AT_ONCE = 4096


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


def _limits(models: Mapping[str, Any]) -> dict[str, int]:
    found = {name: position_limit(causal_model(model).config) for name, model in models.items() if model is not None}
    return {name: limit for name, limit in found.items() if limit is not None}


def length_within(models: Mapping[str, Any], most: int) -> int:
    """`most` tokens, or as many as every one of the models (None is skipped) has positions for."""
    return min([most, *_limits(models).values()])


def check_positions(
    models: Mapping[str, Any],
    max_length: int,
    *,
    setting: str = "max_length",
    rows: Mapping[str, Any] | None = None,
) -> None:
    """Refuses a run whose texts may be longer than one of its models can read.

    Args:
        models: by the name that the message gives them; None is skipped.
        max_length: most tokens of prompt and response.
        setting: what the message calls it.
        rows: token rows by their name, which `max_length` does not cut; what are no token rows is not looked at.

    Raises:
        ValueError: names the model, its limit, and the setting or the row.

    Example:
        >>> check_positions({"student": student, "teacher": teacher}, args.max_length)
    """
    limits = _limits(models)
    for name, limit in limits.items():
        if max_length > limit:
            model = models[name]
            kind = type(causal_model(model)).__name__
            raise ValueError(
                f"{setting}: expected at most {limit}, the positions of the {name} ({kind}), got {max_length}; lower "
                f"{setting}, or take a model for longer texts"
            )
    if limits:
        least = min(limits, key=lambda name: limits[name])
        for source, dataset in (rows or {}).items():
            _check_rows(dataset, source, least, limits[least])


def _check_rows(dataset: Any, source: str, name: str, limit: int) -> None:
    if not _TOKEN_COLUMNS <= set(getattr(dataset, "column_names", None) or ()) or not hasattr(dataset, "with_format"):
        return
    from pyarrow import compute

    first = 0
    for part in dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        lengths = compute.list_value_length(part["input_ids"]).to_numpy()
        if len(lengths) and lengths.max() > limit:
            row = int((lengths > limit).argmax())
            raise ValueError(
                f"{source}: row {first + row + 1} has {lengths[row]} tokens, more than the {limit} positions of the "
                f"{name}; shorten it, or take a model for longer texts"
            )
        first += len(lengths)
