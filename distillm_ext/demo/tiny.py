"""A small world made locally: an instruction language, a character tokenizer, a teacher trained from scratch.

For machines without a network, for tests, and for the end-to-end check. Each row is one instruction and its answer:

    copy c a b = c a b      reverse c a b = b a c      sort c a b = a b c      count a b b = 3
    add 7 5 = 12           last c a b = b             pick c a b = a

`pick` has no single right answer (any item of the list will do), so a teacher's distribution says more than one row of
data does: the reason to distil at all.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distillm_ext.data.batches import pad_rows

LETTERS = "abcdef"
_CHARACTERS = " =+-:\n" + string.digits + string.ascii_lowercase


@dataclass(frozen=True)
class TinyWorld:
    """Everything a distillation run needs, as raw text rows and a tokenizer.

    Attributes:
        tokenizer: one token per character, with a padding and an EOS token.
        train: `prompt`/`completion` rows of the student.
        heldout: such rows with prompts that `train` does not have.
    """

    tokenizer: PreTrainedTokenizerFast
    train: Dataset
    heldout: Dataset


def make_tiny_world(seed: int = 0, *, train_rows: int = 384, heldout_rows: int = 96) -> TinyWorld:
    """Write the rows of the tiny world; the same seed gives the same rows on every machine.

    Example:
        >>> world = make_tiny_world(seed=0)
        >>> world.train[0]["prompt"]  # doctest: +SKIP
        'sort c a b = '
    """
    rows = write_rows(train_rows + heldout_rows, seed)
    return TinyWorld(make_tokenizer(), Dataset.from_list(rows[:train_rows]), Dataset.from_list(rows[train_rows:]))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character of the language; ids 0, 1, 2 are padding, EOS, unknown."""
    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )


def _items(rng: random.Random) -> list[str]:
    return [rng.choice(LETTERS) for _ in range(rng.randint(2, 4))]


def _copy(rng: random.Random) -> tuple[str, str]:
    items = " ".join(_items(rng))
    return f"copy {items}", items


def _reverse(rng: random.Random) -> tuple[str, str]:
    items = _items(rng)
    return f"reverse {' '.join(items)}", " ".join(reversed(items))


def _sort(rng: random.Random) -> tuple[str, str]:
    items = _items(rng)
    return f"sort {' '.join(items)}", " ".join(sorted(items))


def _count(rng: random.Random) -> tuple[str, str]:
    items = _items(rng)
    return f"count {' '.join(items)}", str(len(items))


def _add(rng: random.Random) -> tuple[str, str]:
    left, right = rng.randint(0, 9), rng.randint(0, 9)
    return f"add {left} {right}", str(left + right)


def _last(rng: random.Random) -> tuple[str, str]:
    items = _items(rng)
    return f"last {' '.join(items)}", items[-1]


def _pick(rng: random.Random) -> tuple[str, str]:
    items = _items(rng)
    return f"pick {' '.join(items)}", rng.choice(items)


TASKS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (_copy, _reverse, _sort, _count, _add, _last, _pick)


def write_rows(count: int, seed: int) -> list[dict[str, str]]:
    """`count` rows with distinct prompts, tasks in turn.

    Raises:
        ValueError: more rows than there are distinct prompts.
    """
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    tries = useless = 0
    while len(rows) < count:
        instruction, answer = TASKS[tries % len(TASKS)](rng)
        prompt = f"{instruction} = "
        useless = useless + 1 if prompt in rows else 0
        rows.setdefault(prompt, answer)
        tries += 1
        if useless > 5000:
            raise ValueError(f"count: the language has too few distinct prompts for {count} rows; ask for fewer")
    return [{"prompt": prompt, "completion": answer} for prompt, answer in rows.items()]


def teacher_config(tokenizer: Any) -> LlamaConfig:
    """The tiny teacher's architecture: Llama, 3 layers, 0.13 M parameters."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_teacher(
    tokenizer: Any,
    *,
    seed: int = 0,
    steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 4e-3,
    progress: Callable[[int, int], None] | None = None,
) -> LlamaForCausalLM:
    """Train the teacher from scratch on fresh rows in every step (its seed shifted away from the student's rows).

    Args:
        tokenizer: of `make_tokenizer`.
        seed: of the weights and the rows; the caller's random state is left as it was.
        steps: optimizer steps; 1000 take under a minute on two cores.
        batch_size: rows a step.
        learning_rate: peak, with warm-up and linear decay.
        progress: called with (step, steps) after each step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(teacher_config(tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = max(1, min(50, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    for step in range(steps):
        rows = write_rows(batch_size, seed=(seed + 1) * 1_000_003 + step)
        optimizer.zero_grad()
        model(**_teacher_batch(tokenizer, rows)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps)
    return model.eval().requires_grad_(False)


def _teacher_batch(tokenizer: Any, rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """Right-padded batch with labels on the answers."""
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    answers = tokenizer([row["completion"] for row in rows])["input_ids"]
    end = tokenizer.eos_token_id
    token_rows = [
        {"input_ids": [*prompt, *answer, end], "loss_mask": [0] * len(prompt) + [1] * (len(answer) + 1)}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    padded = pad_rows(token_rows, tokenizer.pad_token_id)
    return dict(zip(("input_ids", "attention_mask", "labels"), map(torch.from_numpy, padded), strict=True))
