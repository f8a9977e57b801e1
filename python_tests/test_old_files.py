"""Caches and checkpoints that an earlier commit wrote open, read and resume as there (see `fixtures/README.md`)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from capture_world import write_world
from fixtures.old_files import (
    CACHES,
    CHECKPOINTS,
    copy_ours,
    make_trainer,
    record_cache,
    record_checkpoint,
    run_to_checkpoint,
    settings_of_cache,
)
from trainer_world import logged
from transformers import TrainerCallback

from distillm_ext.models.loading import load_tokenizer
from distillm_ext.runs.capture import token_rows
from distillm_ext.teacher import CacheSpec, CacheWriter, CompressionSettings, TeacherCache, finish_cache
from distillm_ext.teacher.keys import sequence_key
from distillm_ext.teacher.manifest import Manifest
from distillm_ext.training.checkpoints.folders import load_state

FOLDER = Path(__file__).parent / "fixtures" / "3be6578"
RECORDED = json.loads((FOLDER / "recorded.json").read_text())
BEGUN = CacheSpec(CompressionSettings(50, 4, codec="exact", labels=False))
NOTHING = dict(buffer=[], responses=[], data={}, replay={})


# ---- caches


@pytest.mark.parametrize("name", CACHES)
def test_every_row_of_a_cache_reads_as_it_did(name):
    found = record_cache(TeacherCache.open(FOLDER / name, verify="full"))
    assert len(found) == len(RECORDED["caches"][name]) == 12
    for row, expected in zip(found, RECORDED["caches"][name], strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            if key == "packed":
                assert row[key] == value
            else:  # integers are exact here too
                np.testing.assert_allclose(row[key], value, rtol=1e-6, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_still_that_of_its_rows_and_settings(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    settings = settings_of_cache(name, write_world(Path("world"), rows=12), FOLDER / name)
    tokenizer = load_tokenizer(settings.teacher)
    rows = token_rows(settings, tokenizer)
    cache = TeacherCache.open(FOLDER / name, tokenizer=tokenizer, dataset=rows)
    packed = {tuple(row["tokens"]): row["packed"] for row in RECORDED["caches"][name]}
    found = {
        tuple(row["input_ids"]): cache.get(sequence_key(row["input_ids"], row["loss_mask"])).tobytes().hex()
        for row in rows
    }
    assert found == packed
    CacheWriter(shutil.copytree(FOLDER / name, tmp_path / name), cache.spec).close()


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*/manifest.json")) + sorted(FOLDER.glob("*/shard-*.json")))
def test_a_manifest_written_again_has_the_same_bytes(tmp_path, file):
    manifest = Manifest.read(file)
    manifest.write(tmp_path / "again.json")
    written = json.loads(file.read_text())
    if "seed" in written["details"]:
        assert (tmp_path / "again.json").read_bytes() == file.read_bytes()
    else:  # the seed was a note that only `distillm capture` made
        again = json.loads((tmp_path / "again.json").read_text())
        assert again.pop("checksum") != written.pop("checksum") and again["details"].pop("seed") == 0
        assert again == written


def test_a_capture_that_was_cut_off_goes_on(tmp_path):
    out = shutil.copytree(FOLDER / "begun", tmp_path / "begun")
    known = RECORDED["begun"]
    records = np.frombuffer(bytes.fromhex(known[0]["packed"]), np.uint8).reshape(3, -1)
    with CacheWriter(out, BEGUN) as writer:
        assert len(writer) == 2 and all(writer.has(row["tokens"], row["targets"]) for row in known)
        assert not writer.add(known[0]["tokens"], known[0]["targets"], records)
        assert writer.add([7, 8, 9], [2], records[:1])
    finish_cache(out, BEGUN)
    cache = TeacherCache.open(out)
    found = [(row.tokens.tolist(), row.targets.tolist(), row.packed.tobytes().hex()) for row in cache]
    expected = [(row["tokens"], row["targets"], row["packed"]) for row in known]
    assert found == [*expected, ([7, 8, 9], [2], records[:1].tobytes().hex())]


# ---- checkpoints


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_run_restores_all_of_a_checkpoint_that_names_its_end_tokens(tmp_path, name):
    """With the one field added whose lack makes buffer and stored responses start anew."""
    trainer = make_trainer(name, tmp_path)
    state, tensors = load_state(FOLDER / name)
    trainer.run.reset()
    trainer.run.restore({**state, "eos_token_ids": list(trainer.run.eos_token_ids)}, tensors)
    expected = RECORDED["checkpoints"][name]
    assert record_checkpoint(trainer) == expected
    assert expected["responses"] if name == "responses" else expected["data"] and expected["replay"]


class RecordAtBegin(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        self.recorded, self.step = record_checkpoint(self.trainer), state.global_step


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_run_goes_on_from_a_checkpoint(tmp_path, caplog, name):
    folder, _ = run_to_checkpoint(name, tmp_path)
    copy_ours(FOLDER / name, folder)
    trainer, begin = make_trainer(name, tmp_path), RecordAtBegin()
    begin.trainer = trainer
    trainer.add_callback(begin)
    trainer.train(resume_from_checkpoint=True)
    expected = RECORDED["checkpoints"][name]
    # What ends a response was not noted then.
    assert "replay buffer and stored responses start anew" in caplog.text
    assert begin.recorded == {**NOTHING, "policy": expected["policy"], "data": expected["data"]}
    assert begin.step == CHECKPOINTS[name][0] and trainer.state.global_step == 9
    if expected["data"]:
        assert "computed again" not in caplog.text
        data = [source == "data" for source in logged(trainer, "batch_source")]
        met = [count for count, is_data in zip(logged(trainer, "teacher_rows"), data, strict=True) if is_data]
        assert set(met[3:]) <= {0.0}  # three steps show every row of the data
