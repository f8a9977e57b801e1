"""What a checkpoint holds beside transformers' files, and how it is known to be whole.

transformers writes straight into `checkpoint-N` and resumes from the highest N. A run killed while it writes leaves a
folder that looks like a checkpoint. Here the last file written is a marker; only folders that have it are resumed from,
and the newest of them is never deleted.

Files of ours in `checkpoint-N`:

    distillation_state.json                   φ, its reference loss, counters
    sequences-RRRRR-of-WWWWW.safetensors      replay buffer and stored responses of rank R of W
    complete.json                             the marker
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from distillm_ext.files import move_into_place, sync_path, write_text

STATE_FILE = "distillation_state.json"
MARKER_FILE = "complete.json"
FORMAT_VERSION = 1
_SAFETENSORS_NAMES = {torch.int64: "I64", torch.float32: "F32", torch.uint8: "U8"}
_FOLDER = re.compile(r"checkpoint-(\d+)")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file that is whole or absent."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: the folder is no checkpoint of this trainer") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); resume from an earlier checkpoint") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file that is whole or absent.

    Tensor by tensor: safetensors' own writer makes a copy of all of them first, and what is stored here may be mapped
    from a file that is larger than the memory.
    """
    arrays = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # Widest elements first, so that each tensor starts at a multiple of its element's size.
    names = sorted(arrays, key=lambda name: (-arrays[name].element_size(), name))
    header, offset = {}, 0
    for name in names:
        size = arrays[name].numel() * arrays[name].element_size()
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[arrays[name].dtype],
            "shape": list(arrays[name].shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(arrays[name].numpy().data.cast("B") if arrays[name].numel() else b"")
    move_into_place(temporary, path)


def sequences_file(folder: Path, rank: int, world_size: int) -> Path:
    """The file with the sequences of one rank."""
    return folder / f"sequences-{rank:05d}-of-{world_size:05d}.safetensors"


def save_state(
    folder: Path, *, state: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], rank: int, world_size: int
) -> None:
    """Writes this rank's sequences and, on the rank that has it, the common state."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(sequences_file(folder, rank, world_size), tensors)
    if state is not None:
        write_json(folder / STATE_FILE, {"version": FORMAT_VERSION, "world_size": world_size, **state})


def load_state(folder: Path) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """→ (common state, the tensors of every rank that wrote the checkpoint).

    Raises:
        ValueError: a file is missing, or was written in another format.
    """
    state = read_json(folder / STATE_FILE)
    if state.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder / STATE_FILE}: format version {state.get('version')} is not {FORMAT_VERSION}; resume with the "
            "release of distillm_ext that wrote it"
        )
    files = [sequences_file(folder, rank, state["world_size"]) for rank in range(state["world_size"])]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{folder}: {missing[0]} is missing; resume from another checkpoint")
    return state, [load_file(file) for file in files]


def mark_complete(folder: Path, *, step: int, resumable: bool) -> None:
    """Forces every file of the checkpoint to the disk, then writes the marker."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync_path(path)
    sync_path(folder)
    write_json(folder / MARKER_FILE, {"version": FORMAT_VERSION, "step": step, "resumable": resumable})


def is_complete(folder: str | Path, *, resumable: bool = False) -> bool:
    """Whether the folder was written to its end (and, with `resumable`, holds the optimizer too)."""
    marker = Path(folder) / MARKER_FILE
    return marker.is_file() and (not resumable or bool(read_json(marker).get("resumable")))


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """All folders `checkpoint-N`, complete or not, by rising N."""
    root = Path(output_dir)
    found = [path for path in root.iterdir() if path.is_dir() and _FOLDER.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=_step_of)


def newest_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The complete, resumable checkpoint with the highest step, or None.

    Example:
        >>> trainer.train(resume_from_checkpoint=newest_complete_checkpoint("out"))  # starts anew where there is none
    """
    complete = [path for path in list_checkpoints(output_dir) if is_complete(path, resumable=True)]
    return str(complete[-1]) if complete else None


def remove_checkpoint(folder: Path) -> None:
    """Deletes a checkpoint, the marker first: killed in between, it must not look complete."""
    (folder / MARKER_FILE).unlink(missing_ok=True)
    sync_path(folder)
    shutil.rmtree(folder)


def rotate(output_dir: str | Path, *, limit: int | None, keep: Iterable[str | Path | None] = ()) -> None:
    """Deletes the oldest complete checkpoints beyond `limit`, and the unfinished ones older than the newest complete.

    The newest complete checkpoint always stays.

    Args:
        output_dir: folder of the run.
        limit: most complete checkpoints to keep; None or 0 keeps all and deletes nothing.
        keep: folders that must stay in any case (the one just written, the best so far); None is skipped.
    """
    if not limit or limit < 0:
        return
    folders = list_checkpoints(output_dir)
    complete = [path for path in folders if is_complete(path)]
    if not complete:
        return
    kept = {Path(path).resolve() for path in keep if path is not None}
    removable = [path for path in complete[:-1] if path.resolve() not in kept]
    surplus = min(len(complete) - limit, len(removable))
    unfinished = [path for path in folders if path not in complete and _step_of(path) < _step_of(complete[-1])]
    for folder in unfinished + removable[: max(surplus, 0)]:
        remove_checkpoint(folder)


def _step_of(folder: Path) -> int:
    match = _FOLDER.fullmatch(folder.name)
    assert match is not None, folder
    return int(match.group(1))
