"""Two gloo processes: a NaN on one of them, sets that they cannot share evenly, a balance of experts for each."""

import json
import math

import pytest
import torch
from nan_worker import OPTIONS, RUNS
from safetensors.torch import load_file
from test_router_loss import moe
from trainer_world import expected_gradients, first_step, token_rows


@pytest.fixture(scope="module")
def out(tmp_path_factory, forks):
    """Runs all jobs once."""
    folder = tmp_path_factory.mktemp("ranks")
    done = forks.run("nan_worker", folder, processes=2)
    # Judged by the last files, not by the exit status: gloo may abort after all work is done.
    assert (folder / "done0").is_file() and (folder / "done1").is_file(), done.output[-4000:]
    return folder


def results(out, name):
    return [json.loads((out / f"{name}{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("run", RUNS)
def test_all_ranks_leave_the_step_out_and_the_affected_one_writes(out, run):
    first, second = (load_file(out / f"{run}{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(value, second[name]) and torch.isfinite(value).all() for name, value in first.items())
    names = sorted(path.name for path in (out / run).glob("nan-step-*"))
    assert names == ["nan-step-2-rank-1.json", "nan-step-2-rank-1.safetensors"]
    content = json.loads((out / run / names[0]).read_text())
    assert (content["rank"], content["world_size"]) == (1, 2)
    assert [row["row"] for row in content["rows"]] == [7] and content["rows_of_the_step"] == [6, 7]


@pytest.mark.parametrize("run", ["skip", "late"])
def test_skipped_steps_are_counted_alike(out, run):
    for report in results(out, run):
        assert report["error"] is None and report["world_size"] == 2
        entries = [entry for entry in report["log"] if "nan_steps" in entry]
        assert [entry["nan_steps"] for entry in entries] == [0, 1, 1, 1]
        assert ["loss" in entry for entry in entries] == [True, False, True, True]
        assert all(math.isfinite(entry["loss"]) for entry in entries if "loss" in entry)


def test_both_ways_to_leave_a_step_out_give_the_same_weights(out):
    direct, late = load_file(out / "skip0.safetensors"), load_file(out / "late0.safetensors")
    for name, value in direct.items():
        torch.testing.assert_close(late[name], value, rtol=1e-4, atol=1e-6)


def test_every_rank_stops_and_nothing_of_the_step_is_saved(out):
    errors = [report["error"] for report in results(out, "stop")]
    assert "another process" in errors[0] and "row 7" in errors[1]
    assert [path.name for path in (out / "stop").glob("checkpoint-*")] == ["checkpoint-1"]


def test_evaluation_counts_every_token_once(out):
    expected = {
        f"{count} {name}": sum(map(sum, token_rows(count, seed=1)["loss_mask"]))
        for count in (1, 3, 7, 9)
        for name in OPTIONS
    }
    assert results(out, "evaluation") == [expected, expected]


def test_the_balance_of_a_step_is_the_mean_over_ranks(out, tmp_path):
    rows = token_rows(4)
    settings = dict(train_sampling_strategy="sequential", per_device_train_batch_size=4)
    plain, _ = first_step(tmp_path, model=moe("mixtral", router_aux_loss_coef=0.0), train_dataset=rows, **settings)

    def balance(model):
        total = 0.0
        for start in (0, 2):
            part = rows.select([start, start + 1])["input_ids"]
            length = max(map(len, part))
            ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in part])
            mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in part])
            total = total + model(input_ids=ids, attention_mask=mask, use_cache=False).aux_loss / 2
        return 0.7 * total

    expected, value = expected_gradients(balance, moe("mixtral"))
    found = load_file(out / "router0.safetensors")
    for key, gradient in expected.items():
        if key.endswith("gate.weight"):
            torch.testing.assert_close(found[key] - plain[key], gradient, rtol=1e-2, atol=1e-5)
    for log in results(out, "router"):
        assert log[0]["loss_router"] == pytest.approx(value / 0.7, rel=1e-4)


def test_shards_flag_their_own_gradients_and_the_fused_optimizer_takes_the_flag(out):
    first, second = results(out, "sharded")
    assert (first["bad"], second["bad"]) == ([], ["lm_head.weight"])
    assert all(report["kept"] and report["taken"] for report in (first, second))
