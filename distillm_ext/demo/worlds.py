"""The two worlds of the demo, as files: a real teacher with instruction rows, and the tiny one made here."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from distillm_ext.demo import assets
from distillm_ext.demo.run import World, write_world_rows
from distillm_ext.demo.settings import DemoOptions
from distillm_ext.demo.tiny import make_tokenizer, train_teacher, write_rows
from distillm_ext.evaluation.metrics import Progress


def real_world(folder: Path, options: DemoOptions, say: assets.Say) -> World:
    """SmolLM2-135M-Instruct and Alpaca rows, fetched into the cache."""
    teacher = assets.fetch(assets.TEACHER, say=say)
    table = json.loads(assets.fetch(assets.ROWS, say=say).read_text(encoding="utf-8"))
    return write_world_rows(folder, alpaca_messages(table, options.seed, options.max_characters), options, teacher)


def alpaca_messages(table: list[dict[str, str]], seed: int, max_characters: int = 0) -> list[dict[str, Any]]:
    """Alpaca's instruction, input, output as one user and one assistant turn, shuffled by `seed`.

    Rows of more than `max_characters` in all are left out; 0 keeps every row.
    """
    rows = []
    for entry in table:
        extra = entry.get("input", "").strip()
        question = f"{entry['instruction']}\n\n{extra}" if extra else entry["instruction"]
        if max_characters and len(question) + len(entry["output"]) > max_characters:
            continue
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": entry["output"]}]
        rows.append({"messages": turns})
    random.Random(seed).shuffle(rows)
    return rows


def tiny_world(folder: Path, options: DemoOptions, progress: Progress | None = None) -> World:
    """Rows of the instruction language, and a teacher trained on it from scratch."""
    rows = write_rows(options.train_rows + options.heldout_rows, options.seed)
    tokenizer = make_tokenizer()
    teacher = train_teacher(
        tokenizer,
        seed=options.seed,
        steps=options.teacher_steps,
        progress=None if progress is None else lambda done, total: progress("training the teacher", done, total),
    )
    target = folder / "teacher"
    teacher.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return write_world_rows(folder, rows, options, target)
