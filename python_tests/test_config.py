"""`DistillationConfig`: help for every field, legal values, and messages that name the field."""

import dataclasses
import json
import pickle
import re

import pytest
from trainer_world import tiny_config
from transformers import HfArgumentParser, TrainingArguments

from distillm_ext.functional import DIVERGENCES
from distillm_ext.training import DistillationConfig
from distillm_ext.training.rollouts.policies import POLICIES

OWN_FIELDS = [
    field for field in dataclasses.fields(DistillationConfig)
    if field.name not in {parent.name for parent in dataclasses.fields(TrainingArguments)}
]  # fmt: skip


def test_defaults_are_those_of_the_published_runs(tmp_path):
    config = DistillationConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (config.divergence, config.policy, config.alpha, config.temperature) == ("skew_kl", "dataset", None, 1.0)
    assert (config.max_prompt_length, config.max_length, config.max_new_tokens) == (256, 512, 256)
    assert (config.sgo_initial, config.sgo_increment, config.sgo_threshold) == (0.0, 0.1, 0.1)
    assert (config.schedule, config.replay_ratio, config.replay_capacity) == ("paper", "decreasing", 1000)
    params = config.sampling_params
    assert (params.temperature, params.top_k, params.top_p) == (1.0, 0, 1.0)


@pytest.mark.parametrize("field", OWN_FIELDS, ids=lambda field: field.name)
def test_every_field_has_help(field):
    assert len(field.metadata["help"]) > 10


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"divergence": "kl"}, f"divergence: expected one of {', '.join(DIVERGENCES)}; got 'kl'"),
        ({"policy": "offline"}, f"policy: expected one of {', '.join(POLICIES)}; got 'offline'"),
        ({"schedule": "code"}, "schedule: expected one of paper, reference"),
        ({"replay_ratio": "linear"}, "replay_ratio: expected one of decreasing, constant, increasing"),
        ({"warmup_objective": "kd"}, "warmup_objective: expected one of sft, forward_kl, None"),
        ({"warmup_objective_steps": 3}, "warmup_objective: 3 warmup_objective_steps need an objective"),
        ({"teacher_dtype": "int8"}, "teacher_dtype: expected one of auto"),
        ({"alpha": 1.5}, r"alpha: expected a finite number in \[0, 1\], got 1.5"),
        ({"divergence": "interpolated"}, "alpha: divergence 'interpolated' needs the teacher's share"),
        ({"divergence": "adaptive_kl", "alpha": 1.5}, r"alpha: expected a finite number in \[0, 1\]"),
        ({"alpha": 0.5, "divergence": "forward_kl"}, "alpha: has no meaning for divergence 'forward_kl'"),
        ({"beta": 0.5}, "beta: has no meaning for divergence 'skew_kl'"),
        ({"temperature": 0.0}, "temperature: expected a finite number > 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature: expected a finite number > 0"),
        ({"ce_weight": -0.1}, "ce_weight: expected a finite number >= 0"),
        ({"lm_weight": float("inf")}, "lm_weight: expected a finite number >= 0"),
        ({"mixed_fraction": 1.1}, r"mixed_fraction: expected a finite number in \[0, 1\]"),
        ({"sgo_initial": -0.5}, r"sgo_initial: expected a finite number in \[0, 1\]"),
        ({"replay_capacity": 0}, "replay_capacity: expected an int >= 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: expected an int >= 1, got 2.5"),
        ({"generation_batch_size": 0}, "generation_batch_size: expected an int >= 1"),
        ({"warmup_objective": "sft", "warmup_objective_steps": -1}, "warmup_objective_steps: expected an int >= 0"),
        ({"max_length": 16, "max_prompt_length": 16}, r"max_length: expected more than max_prompt_length \(16\)"),
        ({"sampling": {"top_p": 2}}, "sampling.top_p"),
        ({"sampling": {"nucleus": 0.9}}, "sampling: unknown key 'nucleus'"),
        ({"policy": "adaptive_off_policy"}, "eval_strategy: policy 'adaptive_off_policy'"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: not supported"),
        ({"torch_compile": True}, "torch_compile: not supported"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: not supported"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices: must stay True"),
    ],
)
def test_illegal_values(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **overrides)


@pytest.mark.parametrize("overrides", [{"temperature": "hot"}, {"ce_weight": True}, {"sampling": [1.0]}])
def test_illegal_types(tmp_path, overrides):
    with pytest.raises(TypeError, match=next(iter(overrides))):
        tiny_config(tmp_path, **overrides)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_is_accepted(tmp_path, policy):
    assert tiny_config(tmp_path, policy=policy, eval_strategy="steps", eval_steps=2).policy == policy


@pytest.mark.parametrize(("schedule", "expected"), [("reference", True), ("paper", False)])
def test_reference_schedule_validates_before_training(tmp_path, schedule, expected):
    config = tiny_config(tmp_path, policy="adaptive_off_policy", schedule=schedule, eval_strategy="epoch")
    assert config.eval_on_start is expected


def test_sampling_from_json_and_round_trip(tmp_path):
    config = tiny_config(tmp_path, sampling='{"temperature": 0.5, "top_k": 4}')
    assert (config.sampling_params.temperature, config.sampling_params.top_k) == (0.5, 4)
    copy = DistillationConfig(**{**json.loads(config.to_json_string()), "output_dir": str(tmp_path)})
    assert copy.sampling_params == config.sampling_params


def test_a_pickled_configuration_names_no_class_but_its_own(tmp_path):
    """transformers writes one beside each checkpoint: a module that moves must not make those unreadable."""
    names = set(re.findall(rb"distillm_ext[\w.]*", pickle.dumps(tiny_config(tmp_path, sampling={"top_k": 4}))))
    assert names == {b"distillm_ext.training.config"}


def test_fields_parse_from_a_command_line(tmp_path):
    words = f"--output_dir {tmp_path} --use_cpu --policy mixed --mixed_fraction 0.25 --alpha 0.2 --lm_dataset c.jsonl"
    (config,) = HfArgumentParser(DistillationConfig).parse_args_into_dataclasses(words.split())
    assert (config.policy, config.mixed_fraction, config.alpha, config.lm_dataset) == ("mixed", 0.25, 0.2, "c.jsonl")
