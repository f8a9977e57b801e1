"""How close a student is to its teacher on held-out rows, and how good its own responses are.

Token metrics are taken at response positions with the ground-truth prefix (teacher forcing) and weighted by token over
the whole set: the forward KL from the teacher, the cross-entropy with the ground truth, and how often student and
teacher agree on the most probable token. ROUGE-L compares free-running responses with the reference text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from distillm_ext.data.batches import DistillationCollator, move_batch
from distillm_ext.functional import distillation_loss
from distillm_ext.generation import SamplingParams, generate_responses
from distillm_ext.generation.ends import end_token_ids
from distillm_ext.generation.loop.forward import check_no_virtual_tokens
from distillm_ext.generation.positions import limits_within
from distillm_ext.models.logit_reader import LogitReader, TokenBatch
from distillm_ext.models.vocabulary import check_dataset_ids, compared_vocabulary, padding_id

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of one student.

    Attributes:
        kl: KL(teacher ‖ student), nats per token; nan without a teacher.
        cross_entropy: −log q(ground truth), nats per token.
        agreement: share of tokens at which both models have the same most probable token; nan without a teacher.
        rouge_l: ROUGE-L F × 100 of generated responses, mean over rows; nan if none were generated.
        tokens: response tokens the first three are averaged over.
        rows: rows the token metrics are taken from.
        generated_rows: rows that responses were generated for.
    """

    kl: float
    cross_entropy: float
    agreement: float
    rouge_l: float
    tokens: int
    rows: int
    generated_rows: int

    def measured(self, metric: str) -> bool:
        """Whether a metric was asked for: one that was, and is NaN or inf, tells of a broken model."""
        # The agreement is a share of counted tokens, so it is nan without a teacher alone.
        asked = {"kl": self._compared, "agreement": self._compared, "rouge_l": self.generated_rows > 0}
        return asked.get(metric, True)

    @property
    def _compared(self) -> bool:
        return not math.isnan(self.agreement)

    @property
    def not_finite(self) -> list[str]:
        """Metrics that were asked for and are NaN or inf."""
        return [name for name, value in asdict(self).items() if self.measured(name) and not math.isfinite(value)]

    def as_dict(self) -> dict[str, float | int | None]:
        """JSON-ready: what was not measured, or is NaN or inf (see `not_finite`), becomes None."""
        return {key: v if math.isfinite(v) else None for key, v in asdict(self).items()}


def evaluate_student(
    student: PreTrainedModel,
    rows: Dataset,
    tokenizer: Any,
    *,
    teacher: PreTrainedModel | None = None,
    batch_size: int = 8,
    generate_rows: int = 0,
    max_new_tokens: int = 128,
    max_length: int | None = None,
    sampling: SamplingParams | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Measure a student on token rows.

    Args:
        student: the model to measure; evaluation mode during the call, its mode restored afterwards.
        rows: token rows (`input_ids`, `loss_mask`, `prompt_length`) of `prepare_dataset`.
        tokenizer: decodes responses for ROUGE-L.
        teacher: the model to compare with; None leaves kl and agreement nan.
        batch_size: rows per forward and per generation pass.
        generate_rows: responses are generated for that many rows from the first; 0 leaves rouge_l nan.
        max_new_tokens: most tokens of a generated response. It ends where those of training do (`end_token_ids`).
        max_length: most tokens of prompt and response, to which the rows were cut; None is the model's own limit.
        sampling: how responses are drawn; None is greedy.
        seed: of the draws; a row's response depends on (seed, row number) alone.
        progress: called with (stage, rows done, rows in all).

    Raises:
        ValueError: no rows, no response token, or a parameter out of range.

    Example:
        >>> evaluate_student(student, rows, tokenizer, teacher=teacher).kl  # doctest: +SKIP
        0.83
    """
    for name, value, least in (("batch_size", batch_size, 1), ("generate_rows", generate_rows, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")
    for name, model in (("student", student), ("teacher", teacher)):
        check_no_virtual_tokens(model, name)
    vocab_size = compared_vocabulary(tokenizer, student=student, teacher=teacher)
    models = {"student": student, "teacher": teacher}
    check_dataset_ids(rows, "rows", tokenizer, models=models, vocab_size=vocab_size)
    kl, cross_entropy, agreement, tokens = divergence_metrics(
        student,
        rows,
        teacher=teacher,
        batch_size=batch_size,
        pad_token_id=padding_id(tokenizer, student, teacher),
        vocab_size=vocab_size,
        progress=progress,
    )
    count = min(generate_rows, len(rows))
    score = math.nan
    if count:
        texts, references = generate_texts(
            student,
            rows.select(range(count)),
            tokenizer,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            eos_token_ids=end_token_ids(
                tokenizer, {"student": student, "teacher": teacher}, rows, max_length=max_length, source="rows"
            ),
            sampling=sampling or SamplingParams(temperature=0.0),
            seed=seed,
            progress=progress,
        )
        score = rouge_l(texts, references)
    return EvaluationResult(kl, cross_entropy, agreement, score, tokens, len(rows), count)


def divergence_metrics(
    student: PreTrainedModel,
    rows: Dataset,
    *,
    teacher: PreTrainedModel | None,
    batch_size: int = 8,
    pad_token_id: int = 0,
    vocab_size: int | None = None,
    progress: Progress | None = None,
) -> tuple[float, float, float, int]:
    """Token-weighted means over all response tokens of `rows`: KL(teacher ‖ student), cross-entropy, agreement, tokens.

    The models are compared over the first `vocab_size` entries (`compared_vocabulary`), None takes those both have; the
    cross-entropy is over all of the student's.
    """
    if len(rows) == 0:
        raise ValueError("rows: expected at least one row to evaluate, got none")
    # Rows of like length share a batch: less padding, and the sums do not depend on the order.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    collate, probe = DistillationCollator(pad_token_id), rows[order[-1]]["input_ids"][:16]
    totals = torch.zeros(4, dtype=torch.float64)
    with torch.no_grad(), evaluating(student), evaluating(teacher):
        ours = _reader(student, probe, "student")
        theirs = None if teacher is None else _reader(teacher, probe, "teacher")
        for start in range(0, len(order), batch_size):
            batch = collate(
                [{"prompt_length": 0, **rows[index], "row": index} for index in order[start : start + batch_size]]
            )
            totals += _batch_sums(ours, theirs, batch, vocab_size)
            if progress is not None:
                progress("token metrics", min(start + batch_size, len(order)), len(order))
    kl, cross_entropy, agreement, tokens = totals.tolist()
    if tokens == 0:
        raise ValueError("rows: no response token (loss_mask is 0 everywhere); check max_length and the data")
    nothing = math.nan
    return (
        kl / tokens if teacher is not None else nothing,
        cross_entropy / tokens,
        agreement / tokens if teacher is not None else nothing,
        int(tokens),
    )


@contextmanager
def evaluating(model: PreTrainedModel | None) -> Iterator[None]:
    """Evaluation mode inside, the mode found restored outside."""
    was_training = model is not None and model.training
    if model is not None:
        model.eval()
    try:
        yield
    finally:
        if model is not None:
            model.train(was_training)


def _reader(model: Any, probe: Sequence[int], name: str) -> LogitReader:
    """Logits of the model at chosen positions: prompts never meet the head."""
    reader = LogitReader(model)
    if reader.apart():
        reader.verify(probe, name)
    return reader


def _batch_sums(
    student: LogitReader, teacher: LogitReader | None, batch: dict[str, Any], vocab_size: int | None
) -> Tensor:
    """Sums over the batch's targets: KL, cross-entropy, agreements, count. [4] float64 on the CPU."""
    if len(batch["targets"]) == 0:
        return torch.zeros(4, dtype=torch.float64)
    ours = _logits(student, batch)
    targets = batch["targets"].to(ours.device)
    sums = [torch.zeros((), device=ours.device)] * 4
    sums[1] = functional.cross_entropy(ours.float(), targets, reduction="sum")
    sums[3] = torch.tensor(len(targets), device=ours.device)
    if teacher is not None:
        theirs = _logits(teacher, batch).to(ours.device)
        shared = min(ours.shape[-1], theirs.shape[-1], vocab_size or ours.shape[-1])
        sums[0] = distillation_loss(ours, theirs, targets, divergence="forward_kl", reduction="sum", vocab_size=shared)
        sums[2] = (ours[:, :shared].argmax(dim=-1) == theirs[:, :shared].argmax(dim=-1)).sum()
    return torch.stack([value.double() for value in sums]).cpu()


def _logits(reader: LogitReader, batch: dict[str, Any]) -> Tensor:
    return reader.column_logits(TokenBatch.from_inputs(move_batch(batch, reader.model.device)))


def generate_texts(
    student: PreTrainedModel,
    rows: Dataset,
    tokenizer: Any,
    *,
    batch_size: int,
    max_new_tokens: int,
    sampling: SamplingParams,
    seed: int,
    max_length: int | None = None,
    eos_token_ids: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> tuple[list[str], list[str]]:
    """Responses of the student to the prompts of token rows, and the rows' own responses, as text.

    `max_length` bounds prompt and response; `eos_token_ids` None is what tokenizer, student and rows say.
    """
    ends = eos_token_ids
    if ends is None:
        ends = end_token_ids(tokenizer, {"student": student}, rows, max_length=max_length, source="rows")
    vocab_size = compared_vocabulary(tokenizer, student=student)
    responses: list[list[int]] = []
    for start in range(0, len(rows), batch_size):
        batch = rows.select(range(start, min(start + batch_size, len(rows))))
        prompts = [row["input_ids"][: row["prompt_length"]] for row in batch]
        lengths = [len(prompt) for prompt in prompts]
        limits = limits_within([max_new_tokens] * len(prompts), lengths, max_length, "max_length")
        generated = generate_responses(
            student,
            prompts,
            sampling,
            max_new_tokens=limits,
            eos_token_ids=ends,
            pad_token_id=padding_id(tokenizer, student),
            vocab_size=vocab_size,
            seeds=[seed * 1_000_003 + start + offset for offset in range(len(prompts))],
        )
        responses += generated.token_ids
        if progress is not None:
            progress("responses", len(responses), len(rows))
    references = [row["input_ids"][row["prompt_length"] :] for row in rows]
    return _decode(tokenizer, responses), _decode(tokenizer, references)


def _decode(tokenizer: Any, rows: list[list[int]]) -> list[str]:
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def rouge_l(texts: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F × 100 (Lin, 2004; rouge_score with its Porter stemmer), one reference a text.

    Raises:
        ValueError: no text, or another number of references.
    """
    if not texts or len(texts) != len(references):
        raise ValueError(f"texts: expected one reference each and at least one, got {len(texts)} and {len(references)}")
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    scores = [scorer.score(ref, text)["rougeL"].fmeasure for text, ref in zip(texts, references, strict=True)]
    return 100.0 * sum(scores) / len(scores)
