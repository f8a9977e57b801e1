"""A loss or gradient that is NaN or inf: the optimizer step is not taken, and what is known is written down."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from trainer_world import (
    EOS,
    adaptive,
    logged,
    tiny_config,
    tiny_model,
    tiny_trainer,
    weights,
)
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from distillm_ext.data.rows import origin as row_origin
from distillm_ext.training import load_rows
from distillm_ext.training.faults.nan_policy import NanGuard, StepRecord

RARE = 63
NAN = float("nan")


def rows_with_rare(*places, count=16):
    """Rows of which those at `places` hold the token that breaks a model."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(count):
        prompt = [1, *rng.integers(4, RARE, 4).tolist()]
        if index in places:
            prompt[2] = RARE
        response = [*rng.integers(4, RARE, 5).tolist(), EOS]
        rows.append(
            {"input_ids": prompt + response, "loss_mask": [0] * 5 + [1] * len(response), "prompt_length": len(prompt)}
        )
    return Dataset.from_list(rows)


def broken_at_rare(model, value=NAN):
    """A model whose hidden states are NaN from the rare token on; its weights are sound."""

    def spoil(module, args, output):
        return output.masked_fill((args[0] == RARE)[..., None], value)

    model.model.embed_tokens.register_forward_hook(spoil)
    return model


class States(TrainerCallback):
    """Weights, optimizer and scheduler before and after every optimizer step."""

    def __init__(self):
        self.before, self.after = [], []

    def now(self, kwargs):
        tensors = {name: p.detach().clone() for name, p in kwargs["model"].named_parameters()}
        optimizer, scheduler = kwargs["optimizer"], kwargs["lr_scheduler"]
        return tensors, copy.deepcopy(optimizer.state_dict()), copy.deepcopy(scheduler.state_dict())

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before.append(self.now(kwargs))

    def on_step_end(self, args, state, control, **kwargs):
        self.after.append(self.now(kwargs))


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def make(tmp_path, *, faults=(5,), states=None, **options):
    parts = {
        key: options.pop(key)
        for key in ("model", "teacher", "lm_dataset", "train_dataset", "optimizers")
        if key in options
    }
    parts = dict(teacher=broken_at_rare(tiny_model(2, layers=2)), train_dataset=rows_with_rare(*faults)) | parts
    settings = dict(train_sampling_strategy="sequential", nan_policy="skip", lr_scheduler_type="linear") | options
    return tiny_trainer(tiny_config(tmp_path, **settings), callbacks=[] if states is None else [states], **parts)


def evidence(folder, step=2, rank=""):
    stem = Path(folder) / f"nan-step-{step}{rank}"
    return json.loads(Path(f"{stem}.json").read_text()), load_file(f"{stem}.safetensors")


class NanGradient(TrainerCallback):
    """The gradient of one parameter is NaN in one optimizer step; its loss is finite."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        parameter = model.model.layers[0].mlp.up_proj.weight
        if state.global_step + 1 == self.step:
            self.hook = parameter.register_hook(lambda gradient: gradient * NAN)
        elif hasattr(self, "hook"):
            self.hook.remove()


FAULTS = {
    "teacher": (dict(), {"teacher", "loss", "gradient"}),
    "teacher, no clipping": (dict(max_grad_norm=0.0), {"teacher", "loss", "gradient"}),
    "teacher, sgd": (dict(optim="sgd", optim_args="momentum=0.9"), {"teacher", "loss", "gradient"}),
    "teacher, adafactor": (dict(optim="adafactor"), {"teacher", "loss", "gradient"}),
    "teacher, weight decay": (dict(weight_decay=0.5), {"teacher", "loss", "gradient"}),
    "student": (dict(model=broken_at_rare, teacher=tiny_model), {"student", "loss", "gradient"}),
    "one micro-batch of two": (
        dict(per_device_train_batch_size=2, gradient_accumulation_steps=2), {"teacher", "loss", "gradient"},
    ),
    "kept teacher logits": (dict(reuse_teacher_logits="topk", reuse_k=8), {"teacher", "loss", "gradient"}),
    "warm-up without teacher": (
        dict(model=broken_at_rare, warmup_objective="sft", warmup_objective_steps=4), {"student", "loss", "gradient"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "kinds"), FAULTS.values(), ids=FAULTS)
def test_a_skipped_step_leaves_everything_as_it_was(tmp_path, options, kinds):
    options = {key: value(tiny_model(1) if value is broken_at_rare else 2) if callable(value) else value
               for key, value in options.items()}  # fmt: skip
    states = States()
    trainer = make(tmp_path, states=states, **options)
    trainer.train()
    assert [same(*pair) for pair in zip(states.before, states.after, strict=True)] == [False, True, False, False]
    assert logged(trainer, "nan_steps") == [0, 1, 1, 1]
    assert all(map(math.isfinite, logged(trainer, "loss"))) and len(logged(trainer, "loss")) == 3
    content, tensors = evidence(tmp_path)
    assert set(content["not_finite"]) == kinds and content["step"] == 2 and content["source"] == "data"
    assert [row["row"] for row in content["rows"]] == [5]
    assert content["rows_of_the_step"] == tensors["row"].tolist() == [4, 5, 6, 7]
    assert torch.isfinite(tensors["row_loss"]).tolist() == [True, False, True, True]
    assert RARE in tensors["input_ids"][1] and tensors["attention_mask"].shape == tensors["input_ids"].shape
    assert len(tensors["positions"]) == len(tensors["targets"]) == 24
    assert not list(Path(tmp_path).glob("*.tmp"))


def test_a_gradient_alone_names_its_parameters(tmp_path):
    states = States()
    trainer = make(tmp_path, states=states, faults=())
    trainer.add_callback(NanGradient(3))
    trainer.train()
    assert [same(*pair) for pair in zip(states.before, states.after, strict=True)] == [False, False, True, False]
    content, _ = evidence(tmp_path, step=3)
    assert content["not_finite"] == ["gradient"] and content["rows"] == []
    assert content["parameters"] == ["model.layers.0.mlp.up_proj.weight"]
    assert content["rows_of_the_step"] == [8, 9, 10, 11]
    # Its loss was finite, and is no part of the log either.
    assert len(logged(trainer, "loss")) == 3


@pytest.mark.parametrize("options", [dict(max_grad_norm=1.0), dict(max_grad_norm=0.0, optim="sgd")])
def test_a_norm_that_overflows_counts_as_a_fault(tmp_path, options):
    """Every gradient is finite, but clipping would divide by infinity."""
    model, states = tiny_model(1), States()
    model.model.layers[0].mlp.up_proj.weight.register_hook(lambda gradient: torch.full_like(gradient, 3e38))
    trainer = make(tmp_path, faults=(), states=states, model=model, max_steps=1, **options)
    trainer.train()
    assert trainer.run.nan_guard.skipped == 1 and same(states.before[0], states.after[0])
    content, _ = evidence(tmp_path, step=1)
    assert content["not_finite"] == ["gradient"] and content["parameters"] == []
    assert content["gradient_norm_overflows"]


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "apollo_adamw_layerwise", "lomo", "adalomo"])
def test_optimizers_that_step_in_the_backward_pass_cannot_be_skipped(tmp_path, optim):
    options = dict(optim=optim, optim_target_modules=["mlp"])
    with pytest.raises(ValueError, match=rf"nan_policy: 'skip' .*{optim}"):
        make(tmp_path, **options)
    make(tmp_path, nan_policy="stop", **options)


def test_an_optimizer_handed_over_that_steps_in_the_backward_pass_cannot_be_skipped(tmp_path):
    with pytest.raises(ValueError, match="nan_policy: 'skip'"):
        make(tmp_path, optimizers=(LayerWiseDummyOptimizer(), None))


def test_an_infinite_loss_counts_as_one(tmp_path):
    model = tiny_model(1)
    handle = {}

    def masked(module, args, output):
        return output.index_fill(-1, torch.tensor([9]), float("-inf")) if handle else output

    model.lm_head.register_forward_hook(masked)
    trainer = make(tmp_path, faults=(), model=model, divergence="forward_kl", nan_policy="stop", ce_weight=0.0)
    handle["on"] = True
    with pytest.raises(FloatingPointError, match="step 1: NaN or inf in .*loss, student"):
        trainer.train()
    content, _ = evidence(tmp_path, step=1)
    assert {row["loss"] for row in content["rows"]} == {"inf"}


def test_plain_text_is_named_by_its_block(tmp_path):
    text = Dataset.from_dict({"input_ids": [list(range(4, 36)), [*range(4, 35), RARE], list(range(5, 37))]})
    options = dict(model=broken_at_rare(tiny_model(1)), teacher=tiny_model(2), lm_dataset=text, faults=())
    trainer = make(tmp_path, per_device_train_batch_size=1, max_steps=6, **options)
    trainer.train()
    skipped = logged(trainer, "nan_steps")[-1]
    assert skipped == 2
    for path in Path(tmp_path).glob("nan-step-*.json"):
        content = json.loads(path.read_text())
        assert content["rows"] == [] and set(content["not_finite"]) == {"gradient", "loss", "plain_text"}
        assert content["plain_text_blocks"] == [{"block": 1, "micro_batch": 0, "loss": "nan"}]
        tensors = load_file(path.with_suffix(".safetensors"))
        assert RARE in tensors["text.input_ids"] and len(tensors["text.row_loss"]) == 1


def test_fresh_and_replayed_batches_say_so(tmp_path):
    settings = adaptive(sgo_initial=1.0, replay_capacity=8, replay_ratio="constant", max_steps=10, eval_steps=20)
    trainer = make(tmp_path, faults=range(16), **settings)
    trainer.train()
    assert logged(trainer, "nan_steps")[-1] == 10 and logged(trainer, "loss") == []
    found = {json.loads(path.read_text())["source"] for path in Path(tmp_path).glob("nan-step-*.json")}
    assert found == {"fresh", "replay"}
    assert all(torch.equal(value, weights(trainer)[name]) for name, value in tiny_model(1).named_parameters())


def test_a_log_over_several_steps_is_the_mean_of_the_sound_ones(tmp_path):
    every, few = make(tmp_path / "every"), make(tmp_path / "few", logging_steps=4)
    every.train()
    few.train()
    assert logged(few, "loss") == [pytest.approx(np.mean(logged(every, "loss")), rel=1e-5)]
    assert logged(few, "loss_divergence") == [pytest.approx(np.mean(logged(every, "loss_divergence")), rel=1e-5)]
    assert math.isfinite(few.state.log_history[-1]["train_loss"])


def test_stop_is_the_default_and_keeps_the_state_before(tmp_path):
    assert tiny_config(tmp_path).nan_policy == "stop"
    sound = make(tmp_path / "sound", max_steps=2, faults=(), lr_scheduler_type="constant")
    sound.train()
    options = dict(nan_policy="stop", faults=(9,), save_strategy="steps", save_steps=1, lr_scheduler_type="constant")
    trainer = make(tmp_path / "stop", **options)
    said = r"step 3: NaN or inf in gradient, loss, teacher \(data batch; row 9: loss, teacher;.*nan-step-3.json"
    with pytest.raises(FloatingPointError, match=said):
        trainer.train()
    assert same(weights(trainer), weights(sound)) and same(
        trainer.optimizer.state_dict()["state"], sound.optimizer.state_dict()["state"]
    )
    saved = sorted(path.name for path in (tmp_path / "stop").glob("checkpoint-*"))
    assert saved == ["checkpoint-1", "checkpoint-2"]
    with pytest.raises(FloatingPointError, match="step 3"):
        trainer.train(resume_from_checkpoint=True)
    # The run goes on from there: to the same stop, or past it.
    again = make(tmp_path / "stop", **options)
    with pytest.raises(FloatingPointError, match="step 3"):
        again.train(resume_from_checkpoint=True)
    past = make(tmp_path / "stop", **(options | dict(nan_policy="skip")))
    past.train(resume_from_checkpoint=True)
    assert logged(past, "nan_steps")[-2:] == [1, 1]
    more = make(tmp_path / "stop", **(options | dict(nan_policy="skip", max_steps=6)))
    more.train(resume_from_checkpoint=True)
    assert logged(more, "nan_steps")[-1] == 1  # counted before the checkpoint


def test_broken_weights_are_neither_skipped_over_nor_saved(tmp_path):
    class Spoil(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                model.model.norm.weight.data[3] = float("inf")

    for folder, save_steps, said in (("skip", 4, "step 3: .*norm.weight"), ("save", 2, "step 2: .*nothing is saved")):
        trainer = make(tmp_path / folder, faults=(), save_strategy="steps", save_steps=save_steps)
        trainer.add_callback(Spoil())
        with pytest.raises(FloatingPointError, match=said):
            trainer.train()
        assert not list((tmp_path / folder).glob("checkpoint-*"))
    last = make(tmp_path / "last", faults=(), max_steps=2, nan_policy="stop")
    last.add_callback(Spoil())
    with pytest.raises(FloatingPointError, match="step 2: weights of the student"):
        last.train()


@pytest.mark.parametrize("schedule", ["linear", "cosine_with_min_lr"])
@pytest.mark.parametrize("faults", [(5,), (5, 9), (0, 13)])
def test_a_flag_read_one_step_late_changes_nothing(tmp_path, monkeypatch, schedule, faults):
    """The way without waiting, as on CUDA, with the fused optimizer of the CPU."""
    options = dict(optim="adamw_torch_fused", weight_decay=0.1, lr_scheduler_type=schedule, logging_steps=4)
    options |= dict(lr_scheduler_kwargs={"min_lr_rate": 0.1}) if "min" in schedule else {}
    direct = make(tmp_path / "direct", faults=faults, **options)
    direct.train()
    monkeypatch.setattr(NanGuard, "_on_device", lambda self: True)
    reads = []
    settle = NanGuard.settle
    monkeypatch.setattr(NanGuard, "settle", lambda self: (reads.append(self._unread is not None), settle(self))[1])
    late = make(tmp_path / "late", faults=faults, **options)
    late.train()
    assert reads[:5] == [False, True, True, True, True]  # before each step, and at the log after the last
    assert same(weights(late), weights(direct))
    assert same(late.optimizer.state_dict(), direct.optimizer.state_dict())
    assert same(late.lr_scheduler.state_dict()["last_epoch"], direct.lr_scheduler.state_dict()["last_epoch"])
    assert logged(late, "nan_steps") == logged(direct, "nan_steps") == [len(faults)]
    assert logged(late, "loss") == logged(direct, "loss")
    for step in {place // 4 + 1 for place in faults}:
        first, second = evidence(tmp_path / "late", step), evidence(tmp_path / "direct", step)
        assert first[0]["rows"] == second[0]["rows"] and torch.equal(first[1]["input_ids"], second[1]["input_ids"])


def test_a_late_flag_stops_before_the_next_step_and_before_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(NanGuard, "_on_device", lambda self: True)
    for name, save_steps in (("next", 4), ("save", 2)):
        options = dict(nan_policy="stop", optim="adamw_torch_fused", logging_steps=10, lr_scheduler_type="constant")
        trainer = make(tmp_path / name, save_strategy="steps", save_steps=save_steps, **options)
        with pytest.raises(FloatingPointError, match="step 2"):
            trainer.train()
        sound = make(tmp_path / "sound", faults=(), max_steps=1, **options)
        sound.train()
        assert same(weights(trainer), weights(sound))
        assert not list((tmp_path / name).glob("checkpoint-*"))


class FakeScaler:
    """A gradient scaler's state: its scale, and what it forgets."""

    def __init__(self, scale):
        self.scale, self.updates = scale, []

    def get_scale(self):
        return self.scale

    def update(self, new_scale=None):
        self.updates.append(new_scale)


@pytest.mark.parametrize(("scale", "counts"), [(65536.0, False), (1.0, True)])
def test_overflows_of_the_gradient_scaler_are_no_faults(tmp_path, scale, counts):
    guard = make(tmp_path, faults=()).run.nan_guard

    class Accelerator:
        scaler, sync_gradients = FakeScaler(scale), True

    guard.accelerator = Accelerator()
    guard.begin_step(StepRecord(1, "data", []))
    parameter = torch.nn.Linear(2, 2)
    parameter.weight.grad = torch.full((2, 2), float("inf"))
    guard.add_micro_batch(torch.tensor(1.0), parameter)
    assert guard._record.flags(torch.device("cpu")).tolist() == [0.0, float(counts), 0.0]
    guard.optimizer = type("Optimizer", (), {})()
    guard._leave_out()
    assert Accelerator.scaler.updates == [scale] and guard.optimizer._is_overflow


def test_the_file_and_line_of_a_row_are_named(tmp_path):
    """Blank lines shift the numbers."""
    lines = [json.dumps({"prompt": f"w{4 + i} w5", "completion": "w7 w8"}) for i in range(8)]
    lines[1] = json.dumps({"prompt": "w5", "completion": "w6"}) + "\n"
    lines[5] = json.dumps({"prompt": f"w4 w{RARE}", "completion": "w7 w8"})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    make(tmp_path / "out", train_dataset=load_rows(path), max_steps=2).train()
    content, _ = evidence(tmp_path / "out")
    (row,) = content["rows"]
    assert row["row"] == 5 and row["origin"] == {"dataset_row": 5, "file": str(path), "line": 7}


def test_dropped_rows_shift_the_numbers():
    given = Dataset.from_dict({"text": [[4], [], [5], [], [], [6]]})
    kept = [{"input_ids": [4]}, {"input_ids": [5]}, {"input_ids": [6]}]

    def prepare(rows):
        if not rows[0]["text"]:
            raise ValueError("no row is left")
        return [{"input_ids": rows[0]["text"]}]

    origin = row_origin.RowOrigin(given, kept, prepare)
    assert [origin(row) for row in range(3)] == [{"dataset_row": 0}, {"dataset_row": 2}, {"dataset_row": 5}]
    assert origin(17) == row_origin.RowOrigin(None, kept, prepare)(0) == {}


def test_places_in_files(tmp_path):
    array = tmp_path / "rows.json"
    array.write_text('\n[{"a": 1}, {"a": 2}]')
    assert row_origin.place_in_file(array, 1) == {"row": 2}
    assert row_origin.place_in_file(tmp_path / "rows.parquet", 4) == {"row": 5}
    lines = tmp_path / "rows.json"
    lines.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert row_origin.place_in_file(lines, 1) == {"line": 3}


@pytest.mark.parametrize("wrong", ["ignore", None, True])
def test_the_policy_is_one_of_two(tmp_path, wrong):
    with pytest.raises(ValueError, match="nan_policy: expected one of stop, skip"):
        tiny_config(tmp_path, nan_policy=wrong)
