"""Two gloo processes against one process with the same global batch."""

import json

import pytest
import torch
from safetensors.torch import load_file
from trainer_worker import RANK_JOBS, rank_trainer
from trainer_world import logged, tiny_model, weights

from distillm_ext.models.logit_reader import TokenBatch
from distillm_ext.training.meters import METRICS


@pytest.fixture(scope="module")
def out(tmp_path_factory, forks):
    """Runs all jobs once."""
    folder = tmp_path_factory.mktemp("ranks")
    done = forks.run("trainer_worker", "ranks", folder, processes=2)
    # Judged by the last file, not by the exit status: gloo may abort after all work is done.
    assert (folder / "sharded" / "own_unit_fused.safetensors").is_file(), done.output[-4000:]
    return folder


def reports(out, job):
    return [json.loads((out / job / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def column(report, key):
    return [entry[key] for entry in report["log_history"] if key in entry]


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize("job", ["dataset", "text", "tied"])
def test_gradients_and_weights_equal_those_of_one_process(out, tmp_path, job):
    single, recorder = rank_trainer(tmp_path, job, batch_size=4)
    single.train()
    for rank, report in enumerate(reports(out, job)):
        assert report["world_size"] == 2
        assert_close(load_file(out / job / f"gradients{rank}.safetensors"), recorder.gradients)
        assert_close(load_file(out / job / f"rank{rank}.safetensors"), weights(single))
        for key in ("loss", "loss_divergence", "loss_lm", "loss_ce", *METRICS):
            assert column(report, key) == pytest.approx(logged(single, key), rel=1e-4)


def test_validation_does_not_count_repeated_rows(out, tmp_path):
    single, _ = rank_trainer(tmp_path, "dataset", batch_size=4)
    single.train()
    for report in reports(out, "dataset"):
        for key in ("eval_loss", "eval_divergence", "eval_tokens"):
            assert column(report, key) == pytest.approx(logged(single, key), rel=1e-4)


def test_ranks_decide_alike_and_keep_their_own_responses(out):
    first, second = reports(out, "adaptive")
    assert column(first, "batch_source") == column(second, "batch_source")
    assert set(column(first, "batch_source")) == {"data", "fresh", "replay"}
    assert column(first, "phi") == column(second, "phi")
    assert column(first, "eval_loss") == column(second, "eval_loss")
    assert len(first["buffer"]) == len(second["buffer"]) == 8 and first["buffer"] != second["buffer"]
    assert column(first, "replay_size")[-1] == 16
    assert_close(load_file(out / "adaptive" / "rank0.safetensors"), load_file(out / "adaptive" / "rank1.safetensors"))


def test_epoch_responses_reach_every_rank(out):
    first, second = reports(out, "batched")
    assert sorted(map(int, first["stored"])) == list(range(16)) and first["stored"] == second["stored"]


def test_resume_over_ranks_gives_the_same_weights(out):
    for rank in (0, 1):
        whole = load_file(out / "resume" / f"whole{rank}.safetensors")
        resumed = load_file(out / "resume" / f"resumed{rank}.safetensors")
        assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    log = json.loads((out / "resume" / "resumed0.json").read_text())
    assert {"fresh", "replay"} <= set(column(log, "batch_source"))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("name", "tied"), [("untied", False), ("tied", True), ("own_unit", False)])
def test_fsdp2_gradients_are_exact(out, name, tied, fused):
    model = tiny_model(1, layers=2, tied=tied)
    batch = TokenBatch(torch.arange(4, 34).view(2, 15), torch.ones(2, 15, dtype=torch.long), torch.tensor([3, 7, 20]))
    logits = batch.select(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits)
    (-logits.log_softmax(-1)[:, 5].sum()).backward()
    found = load_file(out / "sharded" / f"{name}{'_fused' if fused else ''}.safetensors")
    assert_close(found, {key: p.grad for key, p in model.named_parameters()})


def test_every_job_ran_on_both_ranks(out):
    assert all(report["world_size"] == 2 for job in RANK_JOBS for report in reports(out, job))
