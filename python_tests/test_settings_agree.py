"""Settings of the trainer, `distillm capture` and `evaluate` that must agree have one limit or default."""

from __future__ import annotations

import inspect
import json
import re

import pytest
import torch
from capture_world import write_world
from trainer_world import tiny_config
from typer.testing import CliRunner

from distillm_ext import (
    _codec,  # noqa: PLC2701  (the compiled codec, imported without torch)
    compress_logits,
)
from distillm_ext.cli import capture as capture_command
from distillm_ext.cli import evaluate as evaluate_command
from distillm_ext.cli.main import app
from distillm_ext.compressed_logits import CompressedLogits
from distillm_ext.data.lengths import MAX_LENGTH, MAX_PROMPT_LENGTH
from distillm_ext.data.rows.loading import load_rows
from distillm_ext.data.tokenise import prepare_dataset
from distillm_ext.models.loading import load_tokenizer
from distillm_ext.packing import record_bytes
from distillm_ext.runs.capture import CaptureSettings
from distillm_ext.runs.settings import DatasetSettings
from distillm_ext.teacher import CompressionSettings, TeacherCache
from distillm_ext.teacher.keys import sequence_key
from distillm_ext.training import DistillationConfig

# ---- entries kept


def capture_settings(tmp_path, **settings):
    return CaptureSettings("teacher", DatasetSettings("x.jsonl"), tmp_path / "cache", **settings)


def test_the_largest_k_is_legal_everywhere_and_one_more_is_refused_by_name(tmp_path):
    assert tiny_config(tmp_path, reuse_teacher_logits="topk", reuse_k=_codec.MAX_K).reuse_k == _codec.MAX_K
    assert capture_settings(tmp_path, k=_codec.MAX_K).k == _codec.MAX_K
    assert CompressionSettings(50_000, _codec.MAX_K).record_bytes == record_bytes(
        "q8", k=_codec.MAX_K, vocab_size=50_000
    )
    refused = [
        (lambda k: tiny_config(tmp_path, reuse_k=k), "reuse_k: expected an int in"),
        (lambda k: capture_settings(tmp_path, k=k), "k: must be at most"),
        (lambda k: CompressionSettings(50_000, k), "k must lie in"),
        (lambda k: record_bytes("q8", k=k, vocab_size=50_000), "k must lie in"),
        (lambda k: _codec.record_bytes("q8", k, 50_000, (1.0,), True, False), "k must lie in"),
        (lambda k: compress_logits(torch.zeros(1, 50), k), "k must lie in"),
    ]
    for call, words in refused:
        with pytest.raises(ValueError, match=f"{words}.*{_codec.MAX_K}.*{_codec.MAX_K + 1}"):
            call(_codec.MAX_K + 1)
    done = CliRunner().invoke(app, ["capture", "--out", str(tmp_path / "cache"), "--k", str(_codec.MAX_K + 1)])
    text = re.sub(r"[^\w-]+", " ", re.sub(r"\x1b\[[\d;]*m", "", done.output))
    assert done.exit_code == 2 and "--k" in text and str(_codec.MAX_K) in text


@pytest.mark.parametrize("vocab", [50, 6000])
@pytest.mark.parametrize("position", [None, torch.tensor([3])])
def test_a_record_holds_the_largest_k(vocab, position):
    method = "topk" if position is None else "sample"
    logits = 2 * torch.randn(1, vocab, generator=torch.Generator().manual_seed(0))
    found = compress_logits(logits, _codec.MAX_K, method=method, position=position)
    back = CompressedLogits.unpack(found.pack("exact"), codec="exact", k=_codec.MAX_K, vocab_size=vocab, method=method)
    assert found.ids.shape == (1, _codec.MAX_K) and torch.equal(back.ids, found.ids)
    if position is None:
        assert int((found.ids >= 0).sum()) == min(vocab, _codec.MAX_K)
    else:
        assert int(found.counts.sum()) == _codec.MAX_K and torch.equal(back.counts, found.counts)


def test_whole_rows_longer_than_a_record_can_be_kept():
    logits = torch.randn(1, _codec.MAX_K + 1, generator=torch.Generator().manual_seed(0))
    assert compress_logits(logits, _codec.MAX_K + 1).ids.sort().values.tolist() == [list(range(_codec.MAX_K + 1))]


# ---- lengths


def test_no_place_has_defaults_of_its_own(tmp_path):
    lengths = (MAX_PROMPT_LENGTH, MAX_LENGTH)
    config = DistillationConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert (config.max_prompt_length, config.max_length) == lengths
    settings = capture_settings(tmp_path)
    assert (settings.max_prompt_length, settings.max_length) == lengths
    # None: what a settings file says, else as in the next test.
    for name in ("max_prompt_length", "max_length"):
        assert inspect.signature(capture_command.capture).parameters[name].default is None
    evaluate = inspect.signature(evaluate_command.evaluate).parameters
    assert evaluate["max_prompt_length"].default == MAX_PROMPT_LENGTH and evaluate["max_length"].default is None


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher with many positions, and rows that the default lengths cut on both sides."""
    folder = write_world(tmp_path_factory.mktemp("world"), rows=9)
    config = folder / "teacher" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 2 * MAX_LENGTH}))
    rows = [
        {"prompt": "copy " + "a b c " * (n * MAX_PROMPT_LENGTH // 12), "completion": "c d e " * (n * MAX_LENGTH // 12)}
        for n in (1, 2, 3)
    ]
    (folder / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_capture_with_defaults_has_every_row_of_a_training_with_defaults(world, tmp_path):
    rows, teacher = world / "long.jsonl", str(world / "teacher")
    command = ["capture", "--teacher", teacher, "--dataset", str(rows), "--out", str(tmp_path / "cache"), "--k", "4"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    config = DistillationConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    cut = prepare_dataset(
        load_rows(rows), load_tokenizer(teacher), max_prompt_length=config.max_prompt_length,
        max_length=config.max_length, source="long",
    )  # fmt: skip
    cache = TeacherCache.open(tmp_path / "cache")
    assert len(cache) == len(cut) == 3 and all(cache.has(sequence_key(r["input_ids"], r["loss_mask"])) for r in cut)
    # Both limits have cut.
    assert max(cut["prompt_length"]) == MAX_PROMPT_LENGTH and max(map(len, cut["input_ids"])) == MAX_LENGTH


def test_an_evaluation_cuts_rows_by_the_same_defaults(world, tmp_path, monkeypatch):
    import distillm_ext.data.tokenise as data

    seen, prepare = {}, data.prepare_dataset

    def watched(rows, tokenizer, **options):
        seen.update(options)
        return prepare(rows, tokenizer, **options)

    monkeypatch.setattr(data, "prepare_dataset", watched)
    command = ["evaluate", str(world / "teacher"), "--dataset", str(world / "long.jsonl"), "--generate", "0"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert (seen["max_prompt_length"], seen["max_length"]) == (MAX_PROMPT_LENGTH, MAX_LENGTH)
