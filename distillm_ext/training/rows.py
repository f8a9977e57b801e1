"""Reading rows of text: JSONL, JSON, Parquet, a saved data set or a hub name, as one `datasets.Dataset`.

A row is one of

* an instruction row, `prompt` and `completion`: two strings, or two lists of `{"role", "content"}` messages;
* a conversation, `messages`: one list of such messages that holds at least one assistant turn;
* a tokenised row, `input_ids`, `loss_mask`, `prompt_length` (what `prepare_dataset` makes);
* plain text, `text`, for the language-modelling term.

`check_row` says what is wrong with a row; whoever knows the file and the line adds them to the message.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, ReadInstruction, load_dataset, load_from_disk

from distillm_ext.paths import expand_path
from distillm_ext.training.row_origin import remembers_source

TOKEN_COLUMNS = ("input_ids", "loss_mask", "prompt_length")
KNOWN_COLUMNS = ("prompt", "completion", "messages", "text", *TOKEN_COLUMNS)
FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_LINE_SUFFIXES = (".jsonl", ".ndjson")


class RowError(ValueError):
    """A row that cannot be used; the message says what is wrong and what to do, not yet where."""


def check_row(row: Mapping[str, Any]) -> str:
    """Return the kind of `row`, "tokens", "completion", "messages" or "text", or raise `RowError`."""
    if all(row.get(name) is not None for name in TOKEN_COLUMNS):
        _check_tokens(row)
        return "tokens"
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is not None and completion is not None:
        _check_completion(prompt, completion)
        return "completion"
    if row.get("messages") is not None:
        check_messages(row["messages"], "messages")
        if not any(message["role"] == "assistant" for message in row["messages"]):
            raise RowError("messages has no assistant turn, so nothing to learn; add one or remove the row")
        return "messages"
    if prompt is not None or completion is not None:
        missing = "completion" if completion is None else "prompt"
        raise RowError(f"column {missing!r} is missing or null; every row needs both 'prompt' and 'completion'")
    if row.get("text") is not None:
        if not isinstance(row["text"], str):
            raise RowError(f"text must be a string, got {_type_name(row['text'])}")
        return "text"
    found = ", ".join(repr(name) for name, value in row.items() if value is not None) or "none"
    raise RowError(
        "expected the columns 'prompt' and 'completion', or 'messages'; non-null columns found: "
        f"{found}. Rename them, or map them with `columns`"
    )


def check_messages(messages: Any, column: str) -> None:
    """Raise `RowError` unless `messages` is a non-empty list of {"role": str, "content": str}."""
    if not isinstance(messages, list):
        raise RowError(f"{column} must be a list of {{'role', 'content'}} messages, got {_type_name(messages)}")
    if not messages:
        raise RowError(f"{column} is an empty list; it needs at least one message, or remove the row")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RowError(f"{column}[{index}] must be a mapping with role and content, got {_type_name(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise RowError(f"{column}[{index}][{key!r}] must be a string, got {_type_name(message.get(key))}")


def _check_completion(prompt: Any, completion: Any) -> None:
    if isinstance(prompt, str) and isinstance(completion, str):
        return
    if isinstance(prompt, str) != isinstance(completion, str):
        raise RowError(
            "prompt and completion must be of one kind, two strings or two lists of messages, got "
            f"{_type_name(prompt)} and {_type_name(completion)}"
        )
    check_messages(prompt, "prompt")
    check_messages(completion, "completion")
    if not any(message["role"] == "assistant" for message in completion):
        raise RowError("completion has no assistant turn, so nothing to learn; add one or remove the row")


def _check_tokens(row: Mapping[str, Any]) -> None:
    ids, mask, prompt_length = (row[name] for name in TOKEN_COLUMNS)
    if not isinstance(ids, list) or not isinstance(mask, list) or len(ids) != len(mask):
        raise RowError("input_ids and loss_mask must be lists of one length")
    if isinstance(prompt_length, bool) or not isinstance(prompt_length, int):
        raise RowError(f"prompt_length must be an integer, got {_type_name(prompt_length)}")
    if not 1 <= prompt_length < len(ids):
        raise RowError(f"prompt_length must be in 1..{len(ids) - 1} (length of input_ids - 1), got {prompt_length}")


def _type_name(value: Any) -> str:
    return "null" if value is None else type(value).__name__


@remembers_source
def load_rows(
    source: str | Path,
    *,
    split: str = "train",
    subset: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Dataset:
    """Load rows of text from a file, a folder or the hub.

    Args:
        source: an existing `.jsonl`, `.json` (an array of objects, or one object a line) or `.parquet` file; a folder
            written by `Dataset.save_to_disk` or readable by `datasets.load_dataset`; otherwise a hub name.
        split: split name, slices allowed: "train", "train[:90%]". A file holds one split, "train".
        subset: configuration name of a hub data set.
        columns: our column name -> the name in the source, for example {"prompt": "instruction"}.

    `~` and environment variables in `source` are replaced.

    Returns:
        A `datasets.Dataset`. From JSON only the columns that mean something here are kept.

    Raises:
        FileNotFoundError: `source` looks like a file and does not exist.
        ValueError: unknown suffix, a split that is not there, or a bad row (message: file, line and remedy).

    Example:
        >>> rows = load_rows("train.jsonl", split="train[:100]")  # doctest: +SKIP
    """
    source = expand_path(source, "source")
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix not in FILE_SUFFIXES:
            raise ValueError(f"{path}: cannot read {suffix or 'a file without suffix'}; use one of {FILE_SUFFIXES}")
        dataset = _from_parquet(path, columns) if suffix == ".parquet" else _from_json(path, columns)
        return _take_split(dataset, split, path)
    if path.is_dir() and (path / "state.json").is_file():
        return _rename(_take_split(load_from_disk(str(path)), split, path), columns, str(path))
    if path.is_dir() and (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))
        assert isinstance(saved, DatasetDict)
        base = split.split("[")[0]
        if base not in saved:
            raise ValueError(f"{path}: no split {base!r}; it has {sorted(map(str, saved))}")
        return _rename(_take_split(saved[base], split, path, base), columns, str(path))
    if not path.exists() and (suffix in FILE_SUFFIXES or str(source).startswith((".", "/", "~"))):
        raise FileNotFoundError(f"{source}: no such file; give an existing {', '.join(FILE_SUFFIXES)} or a hub name")
    return _rename(load_dataset(str(source), subset, split=split), columns, str(source))


def _take_split(dataset: Dataset, split: str, path: Path, name: str = "train") -> Dataset:
    """Apply a split specification such as "train[10%:]" to the one split that `dataset` is."""
    if split == name:
        return dataset
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(dataset)})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{path}: cannot take split {split!r} of a source with the one split {name!r}") from error
    rows = [row for part in parts for row in range(part.from_ or 0, len(dataset) if part.to is None else part.to)]
    return dataset.select(rows)


def _rename(dataset: Dataset, columns: Mapping[str, str] | None, source: str) -> Dataset:
    for target, name in (columns or {}).items():
        if target == name:
            continue
        if name not in dataset.column_names:
            raise ValueError(f"{source}: columns maps {target!r} to {name!r}; columns there: {dataset.column_names}")
        if target in dataset.column_names:
            dataset = dataset.remove_columns(target)
        dataset = dataset.rename_column(name, target)
    return dataset


def _from_parquet(path: Path, columns: Mapping[str, str] | None) -> Dataset:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
    except (pyarrow.lib.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error
    wanted = [name for name in names if name in KNOWN_COLUMNS or name in (columns or {}).values()]
    if not wanted:
        raise ValueError(f"{path}: none of the columns {KNOWN_COLUMNS}; it has {names}. Map them with `columns`")
    return _rename(Dataset.from_parquet(str(path), columns=wanted), columns, str(path))


def _from_json(path: Path, columns: Mapping[str, str] | None) -> Dataset:
    """Parse every row here and not in Arrow's reader, which names neither the line nor the column of a bad row."""
    rows: list[dict[str, Any]] = []
    shapes: dict[str, tuple[type, str]] = {}
    for place, row in _json_rows(path):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {place}: expected a JSON object, got {_type_name(row)}")
        for target, name in (columns or {}).items():
            row[target] = row.get(name)
        try:
            check_row(row)
        except RowError as error:
            raise ValueError(f"{path}, {place}: {error}") from error
        kept = {name: row[name] for name in KNOWN_COLUMNS if row.get(name) is not None}
        _check_shapes(kept, shapes, path, place)
        _check_text(kept, path, place)
        rows.append(kept)
    if not rows:
        raise ValueError(f"{path}: the file holds no row")
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in shapes})


def _check_shapes(row: dict[str, Any], shapes: dict[str, tuple[type, str]], path: Path, place: str) -> None:
    """A column of an Arrow table has one type: a string here and a list there is an error of the file."""
    for name, value in row.items():
        known, where = shapes.setdefault(name, (type(value), place))
        if type(value) is not known:
            raise ValueError(
                f"{path}, {place}: {name} is {_type_name(value)} here and {known.__name__} in {where}; use one type"
            )


def _check_text(row: dict[str, Any], path: Path, place: str) -> None:
    """JSON can spell half of a surrogate pair, which is no text and cannot be stored."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        broken = error.object[error.start]
        raise ValueError(f"{path}, {place}: holds {broken!a}, which is no character; remove it") from error


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("line 7" or "row 7", parsed value)."""
    with path.open("rb") as file:
        start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if path.suffix.lower() in _LINE_SUFFIXES or not start.startswith(b"["):
        yield from _json_lines(path)
        return
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: invalid JSON: {error}; correct or remove the entry there") from error
    for index, value in enumerate(values, start=1):
        yield f"row {index}", value


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: invalid JSON: {error}; correct or remove the line") from error
