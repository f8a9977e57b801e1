"""`DistillationConfig`: transformers' training arguments and the choices of distillation."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from distillm_ext._codec import MAX_K
from distillm_ext.checks.options import DEFAULT_ALPHA, DEFAULT_BETA, DIVERGENCES, TAILS
from distillm_ext.data.lengths import MAX_LENGTH, MAX_PROMPT_LENGTH
from distillm_ext.data.rows.checks import checked_template_kwargs
from distillm_ext.generation.sampling import SamplingParams
from distillm_ext.models.frozen_teacher import TEACHER_DTYPES
from distillm_ext.packing import CODECS
from distillm_ext.paths import expand_path
from distillm_ext.training.faults.nan_policy import NAN_POLICIES
from distillm_ext.training.rollouts.policies import POLICIES, reads_responses
from distillm_ext.training.rollouts.schedule import REPLAY_RATIOS, SCHEDULES
from distillm_ext.training.teaching.rules import REUSE_METHODS, check_compressed_loss

WARMUP_OBJECTIVES = ("sft", "forward_kl")
# Which divergences have which parameter.
_PARAMETERS = {"alpha": tuple(DEFAULT_ALPHA), "beta": tuple(DEFAULT_BETA)}
# Fields of ours and of TrainingArguments that may name a file or a folder.
_PATH_FIELDS = (
    "output_dir", "logging_dir", "lm_dataset", "resume_from_checkpoint", "deepspeed", "fsdp_config",
    "accelerator_config",
)  # fmt: skip


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DistillationConfig(TrainingArguments):
    """Settings of a distillation run: everything of `transformers.TrainingArguments`, and the fields below.

    The loss (`divergence`, …), the data policy (`policy`, …) and the teacher are independent choices.

    Raises:
        ValueError, TypeError: a field is out of range; the message names it and the legal values.

    Example:
        >>> DistillationConfig(output_dir="out", divergence="skew_kl", policy="adaptive_off_policy", sgo_initial=0.2,
        ...                    eval_strategy="steps", eval_steps=100)
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "sampling", "chat_template_kwargs"]

    divergence: str = _option("skew_kl", f"Divergence between teacher and student: one of {', '.join(DIVERGENCES)}.")
    alpha: float | None = _option(
        None, "Parameter α of the divergence; None is its published default ('interpolated' has none)."
    )  # fmt: skip
    beta: float | None = _option(None, "Parameter β of the divergence; None is its published default.")
    temperature: float = _option(1.0, "Softmax temperature of the loss, on both sides. No T² factor. > 0.")
    ce_weight: float = _option(
        0.0, "Weight of the cross-entropy with the data set's (or the teacher's) responses, at temperature 1. >= 0. "
        "Left out in steps on the student's own responses, which are no ground truth."
    )  # fmt: skip
    lm_dataset: str | None = _option(
        None, "Plain text for an additional language-modelling loss: a JSONL or Parquet file, or a hub name, with a "
        "`text` column."
    )  # fmt: skip
    lm_weight: float = _option(1.0, "Weight of the plain-text loss, used where there is an lm_dataset. >= 0.")
    policy: str = _option("dataset", f"Which responses are trained on: one of {', '.join(POLICIES)}.")
    mixed_fraction: float = _option(0.5, "policy 'mixed': probability of an on-policy step, in [0, 1].")
    schedule: str = _option("paper", "policy 'adaptive_off_policy': the rule for φ, 'paper' or 'reference' (the code).")
    replay_ratio: str = _option(
        "decreasing", "Share of the steps on student responses that generate, at step t of T: 'decreasing' φ(1 - t/T), "
        "'constant' 0.5φ, 'increasing' φt/T."
    )  # fmt: skip
    sgo_initial: float = _option(0.0, "Initial φ, the probability of training on student responses, in [0, 1].")
    sgo_increment: float = _option(0.1, "What φ gains when the validation loss rises, in [0, 1] (1/N_φ in the paper).")
    sgo_threshold: float = _option(0.1, "ε: how much the validation loss must rise above its reference. >= 0.")
    replay_capacity: int = _option(1000, "Most sequences in the replay buffer, over all processes. >= 1.")
    warmup_objective: str | None = _option(
        None, "Objective of the first warmup_objective_steps steps, on the data set: 'sft' (cross-entropy) or "
        "'forward_kl'. A student cut from its teacher needs one before skew KL can teach it."
    )  # fmt: skip
    warmup_objective_steps: int = _option(0, "Optimizer steps of warmup_objective. >= 0.")
    max_prompt_length: int = _option(
        MAX_PROMPT_LENGTH, "Most prompt tokens; longer prompts lose their beginning. >= 1."
    )  # fmt: skip
    max_length: int = _option(MAX_LENGTH, "Most tokens of prompt and response together; > max_prompt_length.")
    chat_template_kwargs: dict[str, Any] | str | None = _option(
        None, "Arguments for the chat template, such as {enable_thinking: false}; a row's own win."
    )  # fmt: skip
    max_new_tokens: int = _option(256, "Most tokens of a generated response. >= 1.")
    sampling: dict[str, Any] | str | None = _option(
        None, "How responses are sampled: a mapping with temperature (1.0; 0 is greedy), top_k (0 = off), top_p (1.0)."
    )  # fmt: skip
    generation_batch_size: int | None = _option(
        None, "Prompts per generation pass and process; None is all of an optimizer step's. >= 1."
    )
    tail: str | None = _option(
        None, f"Compressed teacher logits: how entries that were not kept count, one of {', '.join(TAILS)}. None is "
        "'sampled' for sampled ones, else 'bucket'."
    )  # fmt: skip
    reuse_teacher_logits: str = _option(
        "off", "Keep the teacher's output, compressed, with every data row and every replayed sequence, so that the "
        "teacher sees each sequence once: 'topk' (the reuse_k largest), 'sample' (reuse_k draws), or 'off'."
    )  # fmt: skip
    reuse_k: int = _option(64, f"Entries (or draws) kept per position. In [1, {MAX_K}].")
    reuse_codec: str = _option("q8", f"How kept entries are stored: one of {', '.join(CODECS)}.")
    reuse_memory_mib: int | None = _option(
        None, "Not used any more; a value is warned about. Kept teacher logits lie in temporary files in output_dir; "
        "the system's page cache keeps in memory what fits."
    )  # fmt: skip
    teacher_dtype: str = _option("auto", f"Dtype of the teacher: one of {', '.join(TEACHER_DTYPES)}.")
    nan_policy: str = _option(
        "stop", "What a NaN or inf in a loss or gradient does: 'stop' ends the run with an error, 'skip' leaves the "
        "optimizer step out and counts it (`nan_steps` in the log). Either way weights and optimizer stay as they "
        "were, on all processes, and what is known goes to nan-step-N.json and .safetensors in output_dir."
    )  # fmt: skip
    logging_nan_inf_filter: bool = _option(
        False, "Hide NaN and inf from the logged loss. Off here: the check waits for the device in every micro-batch."
    )

    def __post_init__(self) -> None:
        for name in _PATH_FIELDS:
            value = getattr(self, name, None)
            if isinstance(value, (str, os.PathLike)) and not str(value).lstrip().startswith("{"):  # not JSON
                setattr(self, name, expand_path(value, name))
        super().__post_init__()
        self._check_choices()
        self._check_ranges()
        self._check_combinations()
        if self.reuse_memory_mib is not None:
            warnings.warn(
                "reuse_memory_mib: not used any more, leave it out; kept teacher logits lie in temporary files in "
                "output_dir, of which the system's page cache keeps in memory what fits",
                FutureWarning,
                stacklevel=3,
            )
        _ = self.sampling_params  # refuses what it cannot be
        self.template_kwargs = checked_template_kwargs(self.chat_template_kwargs)
        if self.policy == "adaptive_off_policy" and self.schedule == "reference":
            # The published code takes its first reference loss before training.
            self.eval_on_start = True

    @property
    def needs_responses(self) -> bool:
        """Whether some step of the run trains on responses of its training set."""
        return reads_responses(
            self.policy, mixed_fraction=self.mixed_fraction, warmup_steps=self.warmup_objective_steps
        )

    @property
    def teacher_temperatures(self) -> tuple[float, ...]:
        """Temperatures at which a loss of the run reads the teacher, ascending."""
        warmup = {1.0} if self.warmup_objective == "forward_kl" and self.warmup_objective_steps else set()
        return tuple(sorted({float(self.temperature), *warmup}))

    def _check_choices(self) -> None:
        choices: dict[str, tuple[str | None, ...]] = {
            "divergence": tuple(DIVERGENCES),
            "policy": POLICIES,
            "schedule": tuple(SCHEDULES),
            "replay_ratio": REPLAY_RATIOS,
            "warmup_objective": (*WARMUP_OBJECTIVES, None),
            "teacher_dtype": tuple(TEACHER_DTYPES),
            "tail": (*TAILS, None),
            "reuse_teacher_logits": REUSE_METHODS,
            "reuse_codec": CODECS,
            "nan_policy": NAN_POLICIES,
        }
        for name, legal in choices.items():
            value = getattr(self, name)
            if value not in legal:
                raise ValueError(f"{name}: expected one of {', '.join(map(str, legal))}; got {value!r}")

    def _check_ranges(self) -> None:
        for name in ("mixed_fraction", "sgo_initial", "sgo_increment"):
            _check_number(name, getattr(self, name), 0.0, 1.0)
        for name in ("ce_weight", "lm_weight", "sgo_threshold"):
            _check_number(name, getattr(self, name), 0.0, math.inf)
        _check_number("temperature", self.temperature, 0.0, math.inf, above=True)
        for name, takers in _PARAMETERS.items():
            value = getattr(self, name)
            if value is not None and self.divergence not in takers:
                raise ValueError(
                    f"{name}: has no meaning for divergence {self.divergence!r}; leave it out, got {value!r}"
                )
            if value is not None:
                bounds = (-math.inf, math.inf) if self.divergence == "alpha_beta" else (0.0, 1.0)
                _check_number(name, value, *bounds)
        if self.divergence == "interpolated" and self.alpha is None:
            raise ValueError("alpha: divergence 'interpolated' needs the teacher's share in [0, 1]; got None")
        lengths = ("replay_capacity", "max_prompt_length", "max_length", "max_new_tokens", "generation_batch_size")
        from_zero = ("warmup_objective_steps",)
        for name in (*lengths, *from_zero, "reuse_k"):
            value, least = getattr(self, name), 0 if name in from_zero else 1
            if value is None and name == "generation_batch_size":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")
        if self.reuse_k > MAX_K:
            raise ValueError(f"reuse_k: expected an int in [1, {MAX_K}], got {self.reuse_k}")

    def _check_combinations(self) -> None:
        if self.max_length <= self.max_prompt_length:
            raise ValueError(
                f"max_length: expected more than max_prompt_length ({self.max_prompt_length}), which leaves room for a "
                f"response; got {self.max_length}"
            )
        if self.warmup_objective is None and self.warmup_objective_steps > 0:
            raise ValueError(
                f"warmup_objective: {self.warmup_objective_steps} warmup_objective_steps need an objective; expected "
                f"one of {', '.join(WARMUP_OBJECTIVES)}, got None"
            )
        if self.reuse_teacher_logits != "off":
            check_compressed_loss(
                self.divergence, alpha=self.alpha, tail=self.tail, temperature=self.temperature,
                method=self.reuse_teacher_logits,
            )  # fmt: skip
        if self.policy == "adaptive_off_policy" and self.eval_strategy == IntervalStrategy.NO:
            raise ValueError(
                "eval_strategy: policy 'adaptive_off_policy' raises φ when the validation loss rises, so it needs "
                "validations; set eval_strategy='steps' with eval_steps, or 'epoch', and pass an eval_dataset"
            )
        unsupported = {
            "auto_find_batch_size": "it starts again in the middle of a run; set per_device_train_batch_size",
            "torch_compile": "the loss is computed inside the student's head; call model.model.compile() yourself",
            "label_smoothing_factor": "the teacher's distribution takes its place; set ce_weight or temperature",
            "bf16_full_eval": "validation runs in the precision of training",
            "fp16_full_eval": "validation runs in the precision of training",
            "use_liger_kernel": "it replaces the head that the loss is computed in",
        }
        for name, reason in unsupported.items():
            if getattr(self, name):
                raise ValueError(f"{name}: not supported ({reason}); got {getattr(self, name)!r}")
        accelerate: Any = self.accelerator_config
        if accelerate.dispatch_batches:
            raise ValueError(
                "accelerator_config.dispatch_batches: not supported (it cuts every tensor of a batch by rows, and the "
                "positions of the loss are not rows); leave it out"
            )
        if not self.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices: must stay True; the loss is divided by the global count")

    @property
    def sampling_params(self) -> SamplingParams:
        """`sampling` as generation takes it. Made anew each time: pickles of a configuration name no class of ours."""
        if self.sampling is None:
            return SamplingParams()
        if not isinstance(self.sampling, dict):
            raise TypeError(f"sampling: expected a mapping, got {self.sampling!r} ({type(self.sampling).__name__})")
        return SamplingParams.from_mapping(self.sampling)


def _check_number(name: str, value: object, least: float, most: float, *, above: bool = False) -> None:
    """A finite number in [least, most], or in (least, most] with `above`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r} ({type(value).__name__})")
    if not math.isfinite(value) or not least <= value <= most or (above and value == least):
        bound = f"{'>' if above else '>='} {least:g}" if most == math.inf else f"in [{least:g}, {most:g}]"
        raise ValueError(f"{name}: expected a finite number {bound}, got {value!r}")
