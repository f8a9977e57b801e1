"""`distillm capture`: what the cache holds, going on after a kill, several processes, the command line."""

import dataclasses
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from capture_world import LAUNCHERS, LENGTHS, capture_settings, launch, write_world
from cli_world import run
from tiers import full
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillm_ext import compress_logits
from distillm_ext.models.frozen_teacher import ModelTeacher
from distillm_ext.runs import capture as capture_job
from distillm_ext.runs.capture import Processes, capture, token_rows
from distillm_ext.runs.capture_rows import CaptureCount
from distillm_ext.teacher import CacheMismatch, CacheWriter, TeacherCache
from distillm_ext.teacher.keys import draw_positions, sequence_key
from distillm_ext.teacher.manifest import Manifest


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def content(path):
    """Everything in a cache by key: order and shards do not matter."""
    return {sequence_key(row.tokens, mask_of(row)): row.packed.tobytes() for row in TeacherCache.open(path)}


def mask_of(row):
    mask = np.zeros(len(row.tokens), dtype=bool)
    mask[row.targets] = True
    return mask


@pytest.fixture(scope="module")
def captured(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("captured") / "cache"
    count = capture(capture_settings(world, out), processes=Processes())
    assert (count.rows, count.found) == (40, 0)
    return out


# ---- content


@pytest.mark.parametrize("method", ["topk", "sample"])
def test_the_cache_holds_what_the_teacher_says_about_every_response(world, tmp_path, method):
    settings = capture_settings(world, tmp_path, method=method, temperatures=(1.0, 2.0), codec="exact", seed=3)
    capture(settings, processes=Processes())
    tokenizer = AutoTokenizer.from_pretrained(world / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(world / "teacher", dtype=torch.float32).eval()
    cache = TeacherCache.open(tmp_path, teacher=teacher, tokenizer=tokenizer, dataset=token_rows(settings, tokenizer))
    assert cache.spec.compression.vocab_size == len(tokenizer) < teacher.config.vocab_size
    for row in token_rows(settings, tokenizer):
        ids, mask = torch.tensor([row["input_ids"]]), torch.tensor(row["loss_mask"], dtype=torch.bool)
        with torch.no_grad():
            logits = teacher(ids).logits[0, :-1][mask[1:], : len(tokenizer)]
        key = sequence_key(row["input_ids"], row["loss_mask"])
        draws = dict(seed=3, position=torch.from_numpy(draw_positions([key], [len(logits)])))
        wanted = compress_logits(
            logits, 16, method=method, temperatures=(1.0, 2.0), labels=ids[0][mask],
            **(draws if method == "sample" else {}),
        )  # fmt: skip
        found = cache.lookup(row["input_ids"], [mask.numpy()])
        assert found.method == method
        if method == "sample":
            # Padding of rows in a batch moves logits by rounding, and a draw where two sums meet.
            assert (found.counts.sum(-1) == 16).all()
            assert (found.ids == wanted.ids).all(dim=-1).float().mean() >= 0.5
            continue
        torch.testing.assert_close(found.logprobs, wanted.logprobs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.tail_logprob, wanted.tail_logprob, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.label_logprob, wanted.label_logprob, rtol=1e-4, atol=1e-4)


def test_batches_and_processes_do_not_matter(world, captured, tmp_path):
    other = tmp_path / "other"
    for rank in (1, 0):  # the first process finishes the cache
        capture_alone(capture_settings(world, other, batch_size=3), rank, 2)
    first, second = content(captured), content(other)
    assert first.keys() == second.keys() and len(first) == 40
    assert sum(first[key] == second[key] for key in first) >= 36  # the rest differ by rounding in another batch


def capture_alone(settings, rank, world_size):
    """One of several processes, run to its end before the next one starts."""

    class Alone(Processes):
        def start(self):
            pass

        def wait(self):
            pass

    return capture(settings, processes=Alone(rank, world_size, 0))


# ---- going on


def test_a_finished_cache_is_left_as_it_is(world, captured):
    before = {path.name: path.read_bytes() for path in captured.iterdir()}
    count = capture(capture_settings(world, captured), processes=Processes())
    assert (count.rows, count.found, count.tokens) == (40, 40, 0)
    assert {path.name: path.read_bytes() for path in captured.iterdir()} == before


class Stopped(Exception):
    pass


def stop_after(batches):
    def progress(count, total):
        if count.tokens and (count.rows - count.found) >= 4 * batches:
            raise Stopped

    return progress


def test_killed_and_stopped_it_goes_on_and_nothing_is_lost_or_doubled(world, captured, tmp_path, forks):
    done = forks.run("capture_world", world, tmp_path, "--kill-after-batches", 3)
    assert done.codes == [-signal.SIGKILL], done.output
    with pytest.raises(ValueError, match="was not finished"):
        TeacherCache.open(tmp_path)
    settings = capture_settings(world, tmp_path, flush_seconds=0.0)
    with pytest.raises(Stopped):
        capture(settings, processes=Processes(), progress=stop_after(4))
    count = capture(settings, processes=Processes())
    assert (count.rows, count.found) == (40, 28)
    cache = TeacherCache.open(tmp_path, verify="full")
    assert cache.manifest.rows == len(cache) == 40
    first, second = content(captured), content(tmp_path)
    assert first.keys() == second.keys()


class NanAtRow(ModelTeacher):
    """A teacher whose logits are NaN at the last target of the row with these tokens (one row a batch)."""

    tokens: tuple[int, ...] = ()

    def compressed(self, batch, settings, labels, position):
        found = super().compressed(batch, settings, labels, position)
        bad = torch.tensor([tuple(row) == self.tokens for row in batch.input_ids.tolist()])
        rows = batch.positions.cpu() // batch.input_ids.shape[1]
        last = torch.cat([rows[1:] != rows[:-1], torch.tensor([True])])
        return dataclasses.replace(found, valid=found.valid & ~(bad[rows] & last))


@pytest.mark.parametrize("method", ["topk", "sample"])
@pytest.mark.parametrize(("row", "place"), [(5, "train.jsonl, line 6"), (32 + 2, "eval.jsonl, line 3")])
def test_a_teacher_of_nan_ends_the_capture_with_the_row(world, tmp_path, monkeypatch, row, place, method):
    settings = capture_settings(world, tmp_path, method=method, batch_size=1)
    rows = token_rows(settings, AutoTokenizer.from_pretrained(world / "teacher"))
    with monkeypatch.context() as patch:
        patch.setattr(capture_job, "ModelTeacher", NanAtRow)
        patch.setattr(NanAtRow, "tokens", tuple(rows[row]["input_ids"]))
        with pytest.raises(FloatingPointError, match=rf"row \d+ of .*{place}\. Nothing of this batch is stored"):
            capture(settings, processes=Processes())
    before = CacheWriter(tmp_path, Manifest.read(next(tmp_path.glob("shard-*.json"))).spec)
    key = rows[row]["input_ids"], np.array(rows[row]["loss_mask"], dtype=bool)
    assert len(before) > 0 and not before.has(*key)
    found = len(before)
    before.close()
    count = capture(settings, processes=Processes())  # the teacher was mended: the same call goes on
    assert (count.rows, count.found) == (40, found)
    assert len(TeacherCache.open(tmp_path, verify="full")) == 40


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_the_command_says_that_the_teacher_is_broken(world, tmp_path, weight):
    teacher = AutoModelForCausalLM.from_pretrained(world / "teacher")
    teacher.model.norm.weight.data[0] = weight
    teacher.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(world / "teacher").save_pretrained(tmp_path / "broken")
    command = ["capture", "--teacher", tmp_path / "broken", "--dataset", world / "train.jsonl", "--rows", 3]
    shown = run(*command, "--max-prompt-length", 24, "--max-length", 40, "--out", tmp_path / "c", code=1)
    assert "error: the teacher's logits are NaN or inf in row" in shown and "train.jsonl, line 1" in shown
    assert not [*(tmp_path / "c").glob("*.bin")]


def test_other_settings_need_another_folder(world, captured, tmp_path):
    with pytest.raises(CacheMismatch, match="k: 16 there, 8 here"):
        capture(capture_settings(world, captured, k=8), processes=Processes())
    with pytest.raises(CacheMismatch, match="teacher: "):
        capture(capture_settings(world, captured, teacher=str(world / "other")), processes=Processes())
    with pytest.raises(CacheMismatch, match="dataset: "):
        capture(capture_settings(world, captured, rows=4), processes=Processes())
    capture(capture_settings(world, tmp_path, method="sample", rows=4), processes=Processes())
    with pytest.raises(CacheMismatch, match="seed: 0 there, 1 here"):
        capture(capture_settings(world, tmp_path, method="sample", rows=4, seed=1), processes=Processes())


@pytest.mark.parametrize("launcher", ["none", *full(*LAUNCHERS)])
def test_two_processes_go_on_from_what_one_had_done(world, captured, tmp_path, forks, launcher):
    with pytest.raises(Stopped):
        capture(capture_settings(world, tmp_path, flush_seconds=0.0), processes=Processes(), progress=stop_after(2))
    if launcher == "none":
        output = forks.run("capture_world", world, tmp_path, processes=2).output
    else:
        output = launch(world, tmp_path, launcher)
    assert (tmp_path / "done1.json").is_file(), output[-3000:]
    reports = [json.loads((tmp_path / f"done{rank}.json").read_text()) for rank in (0, 1)]
    assert [report["rows"] for report in reports] == [20, 20] and sum(report["found"] for report in reports) == 8
    cache = TeacherCache.open(tmp_path, verify="full")
    assert cache.manifest.rows == len(cache) == 40
    assert {shard.file.split("-")[1] for shard in cache.manifest.shards} == {"00000", "00001"}
    assert content(tmp_path).keys() == content(captured).keys()


# ---- the command line


def test_the_command(world, tmp_path):
    command = ["capture", "--teacher", world / "teacher", "--dataset", world / "train.jsonl", "--out", tmp_path / "c"]
    lengths = ["--max-prompt-length", LENGTHS["max_prompt_length"], "--max-length", LENGTHS["max_length"]]
    shown = run(*command, *lengths, "--k", 8, "--temperatures", "1.0,2.0", "--codec", "q6", "--batch-size", 4)
    assert "captured 32/32 rows" in shown and "tokens/s" in shown and "bytes per token" in shown
    spec = TeacherCache.open(tmp_path / "c").spec.compression
    assert (spec.k, spec.codec, spec.temperatures, spec.method) == (8, "q6", (1.0, 2.0), "topk")
    again = run(*command, *lengths, "--k", 8, "--temperatures", "1.0,2.0", "--codec", "q6")
    assert "captured 0 rows" in again and "found 32" in again
    refused = run(*command, *lengths, "--k", 9, "--temperatures", "1.0,2.0", "--codec", "q6", code=2)
    assert "was made with other settings (k: 8 there, 9 here)" in refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperatures", "1;2"], "--temperatures: expected numbers separated by commas"),
        (["--column", "prompt"], "--column: expected OURS=THEIRS"),
        (["--method", "all"], "method: must be one of topk, sample"),
        (["--codec", "q5"], "codec"),
        (["--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_arguments_end_in_one_sentence(world, tmp_path, capsys, arguments, message):
    command = ["capture", "--teacher", world / "teacher", "--dataset", world / "train.jsonl", "--out", tmp_path / "c"]
    from typer.testing import CliRunner

    from distillm_ext.cli.main import app

    result = CliRunner().invoke(app, [str(part) for part in (*command, *arguments)])
    assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=0), "k: must be at least 1, got 0"),
        (dict(k=4097), "k: must be at most 4096, got 4097"),
        (dict(method="top"), "method: must be one of topk, sample, got 'top'"),
        (dict(codec="q5"), "codec: must be one of q4, q6, q8, fp16, exact, got 'q5'"),
        (dict(dtype="int8"), "dtype: must be one of auto, float32, bfloat16, float16, got 'int8'"),
        (dict(temperatures=(0.0,)), "temperatures must lie between"),
        (dict(temperatures=()), "temperatures must be 1 to 16"),
        (dict(out=Path(__file__)), "out: expected a folder"),
        (dict(rows=-1), "rows: must be at least 0"),
        (dict(max_length=1), "max_length: must be at least 2"),
        (dict(flush_seconds=float("nan")), "flush_seconds: must not be negative"),
    ],
)
def test_settings_are_refused_before_a_teacher_is_loaded(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        capture_settings(tmp_path, **({"out": tmp_path} | change))


def test_a_missing_teacher_or_data_set_is_named(tmp_path):
    from typer.testing import CliRunner

    from distillm_ext.cli.main import app

    for given, missing in ((["--teacher", "x"], "--dataset"), (["--dataset", "x"], "--teacher")):
        result = CliRunner().invoke(app, ["capture", *given, "--out", str(tmp_path)])
        assert result.exit_code == 2 and f"{missing}: is missing" in result.stderr


def test_the_rate_counts_what_was_computed():
    assert CaptureCount(rows=10, found=4, tokens=300, seconds=2.0).tokens_per_second == 150.0
