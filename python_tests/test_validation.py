"""Evaluation is over the whole set, every row once, whatever the options of the loader."""

import json
import logging

import pytest
import torch
from trainer_world import tiny_config, tiny_model, tiny_trainer, token_rows

from distillm_ext.training import load_rows
from distillm_ext.training.rollouts.schedule import SCHEDULES
from distillm_ext.training.validation import RowTotals

RARE = 63

OPTIONS = {
    "drop_last": dict(dataloader_drop_last=True),
    "batch larger than the set": dict(dataloader_drop_last=True, per_device_eval_batch_size=16),
    "length groups": dict(train_sampling_strategy="group_by_length"),
    "uneven batches": dict(accelerator_config={"even_batches": False}, dataloader_drop_last=True),
    "split batches": dict(accelerator_config={"split_batches": True}),
    "accumulation": dict(eval_accumulation_steps=1, prediction_loss_only=True),
    "batch metrics": dict(batch_eval_metrics=True, eval_do_concat_batches=False),
    "workers": dict(dataloader_num_workers=1, dataloader_persistent_workers=True, dataloader_drop_last=True),
}


def targets(rows):
    return sum(map(sum, rows["loss_mask"]))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_row_counts_once(tmp_path, options):
    rows = token_rows(7, seed=1)
    plain = tiny_trainer(tiny_config(tmp_path, per_device_eval_batch_size=1), eval_dataset=rows).evaluate()
    found = tiny_trainer(tiny_config(tmp_path, **options), eval_dataset=rows).evaluate()
    assert found["eval_tokens"] == targets(rows)
    for key in ("eval_loss", "eval_divergence"):
        assert found[key] == pytest.approx(plain[key], rel=1e-6)


@pytest.mark.parametrize("count", [1, 5])
def test_sets_of_any_size_in_a_dict_and_on_start(tmp_path, count):
    sets = {"small": token_rows(count, seed=1), "other": token_rows(6, seed=2)}
    settings = dict(eval_on_start=True, eval_strategy="steps", eval_steps=1, max_steps=1, dataloader_drop_last=True)
    trainer = tiny_trainer(tiny_config(tmp_path, **settings), eval_dataset=sets)
    trainer.train()
    for name, rows in sets.items():
        found = [entry[f"eval_{name}_tokens"] for entry in trainer.state.log_history if f"eval_{name}_tokens" in entry]
        assert found == [targets(rows)] * 2


def test_a_set_handed_over_is_numbered_and_is_the_one_that_counts(tmp_path):
    own, other = token_rows(4, seed=1), token_rows(7, seed=2)
    args = tiny_config(
        tmp_path, dataloader_drop_last=True, dataloader_num_workers=1, dataloader_persistent_workers=True
    )
    trainer = tiny_trainer(args, eval_dataset=own)
    assert trainer.evaluate()["eval_tokens"] == targets(own)
    assert trainer.evaluate(other)["eval_tokens"] == targets(other)
    twice = other.add_column("row", [0] * 7)
    assert trainer.evaluate(twice)["eval_tokens"] == targets(other)
    assert trainer.predict(other).metrics["test_tokens"] == targets(other)
    assert trainer.evaluate()["eval_tokens"] == targets(own)
    assert args.dataloader_drop_last and args.dataloader_persistent_workers


def test_a_loader_that_leaves_rows_out_is_an_error(tmp_path):
    trainer = tiny_trainer(tiny_config(tmp_path))
    loader = trainer.get_eval_dataloader()
    loader.base_dataloader.batch_sampler.drop_last = True
    with pytest.raises(RuntimeError, match="4 of 6 rows"):
        trainer.evaluation_loop(loader, "Evaluation")


def test_repeated_rows_count_once_in_the_order_of_their_numbers():
    class TwoProcesses:
        num_processes = 2

        def pad_across_processes(self, tensor, dim, pad_index=0):
            return torch.cat([tensor, torch.full((1, *tensor.shape[1:]), pad_index, dtype=tensor.dtype)])

        def gather(self, tensor):
            return torch.cat([tensor, tensor.flip(0)])

    totals = RowTotals(torch.device("cpu"))
    totals.add(torch.tensor([3, 0]), torch.tensor([[3.0, 3, 3], [1, 1, 1]]))
    totals.add(torch.tensor([2]), torch.tensor([[2.0, 2, 2]]))
    numbers, sums = totals.collect(TwoProcesses())
    assert numbers.tolist() == [0, 2, 3] and sums[:, 0].tolist() == [1, 2, 3]


def test_batches_that_are_dealt_out_by_one_process_are_refused(tmp_path):
    with pytest.raises(ValueError, match="accelerator_config.dispatch_batches"):
        tiny_config(tmp_path, accelerator_config={"dispatch_batches": True})


def test_evaluation_leaves_the_weights_to_the_optimizer_that_averages_them(tmp_path):
    class Averaging(torch.optim.SGD):
        modes: list = []

        def train(self):
            self.modes.append("train")

        def eval(self):
            self.modes.append("eval")

    model = tiny_model(1)
    optimizer = Averaging(model.parameters(), lr=0.1)
    settings = dict(max_steps=1, eval_strategy="steps", eval_steps=1)
    tiny_trainer(tiny_config(tmp_path, **settings), model=model, optimizers=(optimizer, None)).train()
    assert optimizer.modes == ["train", "eval"]


def text_rows(path, *, bad=(), count=8):
    """Rows on disk with a blank line after the first; those at `bad` hold a token that breaks a model."""
    rows = [{"prompt": f"w{4 + i} w{RARE if i in bad else 5}", "completion": "w7 w8"} for i in range(count)]
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join([lines[0], "", *lines[1:]]))
    return load_rows(path)


def broken_at_rare(model):
    def spoil(module, args, output):
        return output.masked_fill((args[0] == RARE)[..., None], float("nan"))

    model.model.embed_tokens.register_forward_hook(spoil)
    return model


def broken_run(tmp_path, side, **options):
    settings = dict(max_steps=2, eval_strategy="steps", eval_steps=1, save_steps=1) | options
    parts = {"model": tiny_model(1), "teacher": tiny_model(2)}
    broken_at_rare(parts[side])
    rows = text_rows(tmp_path / "eval.jsonl", bad=(2, 5))
    return tiny_trainer(
        tiny_config(tmp_path / "out", **settings), train_dataset=text_rows(tmp_path / "train.jsonl"), eval_dataset=rows,
        **parts,
    )  # fmt: skip


@pytest.mark.parametrize(("side", "kinds"), [("model", "loss, divergence"), ("teacher", "divergence")])
@pytest.mark.parametrize("best", [False, True])
def test_rows_that_make_the_evaluation_nan_are_named(tmp_path, caplog, side, kinds, best):
    extra = dict(load_best_model_at_end=True, save_strategy="steps") if best else {}
    trainer = broken_run(tmp_path, side, **extra)
    with caplog.at_level(logging.WARNING, logger="distillm_ext.training.validation"):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "2 of 8 rows" in record.getMessage()]
    assert len(said) == 2 and trainer.state.global_step == 2
    path = tmp_path / "eval.jsonl"
    for text in said:
        assert f"row 2 of {path}, line 4: {kinds}" in text and f"row 5 of {path}, line 7: {kinds}" in text
        assert ("not taken for the best one" in text) is best


@pytest.mark.parametrize("options", [{}, dict(warmup_objective="sft", warmup_objective_steps=1)])
def test_a_policy_that_needs_the_validation_loss_ends_with_the_rows(tmp_path, options):
    trainer = broken_run(tmp_path, "model", policy="adaptive_off_policy", replay_capacity=8, **options)
    with pytest.raises(FloatingPointError, match=r"step 1: .*eval_loss.*row 2 of .*line 4: loss.*φ"):
        trainer.train()
    assert trainer.evaluate()["eval_tokens"] > 0  # by hand it is a warning


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_schedule_takes_no_loss_that_is_not_finite(name, loss):
    schedule = SCHEDULES[name]()
    for take in (schedule.observe, schedule.rebase):
        with pytest.raises(FloatingPointError, match="validation loss"):
            take(loss)
    assert schedule.reference_loss is None
