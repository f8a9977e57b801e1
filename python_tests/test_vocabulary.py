"""Ids with holes, padding and added tokens that a model does not know, and the one vocabulary that all compare."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trainer_world import VOCAB, logged, tiny_config, tiny_model, tiny_tokenizer, tiny_trainer, token_rows
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from distillm_ext.evaluation.metrics import evaluate_student
from distillm_ext.models.vocabulary import (
    check_dataset_ids,
    compared_vocabulary,
    embedding_size,
    padding_id,
    tokenizer_size,
)
from distillm_ext.runs.capture import CaptureSettings, Processes, capture
from distillm_ext.runs.settings import DatasetSettings
from distillm_ext.teacher import CacheMismatch, TeacherCache
from distillm_ext.teacher.manifest import MANIFEST, Manifest

HIGHEST = 60


@pytest.fixture
def holes() -> PreTrainedTokenizerFast:
    """40 tokens; the end token has the id 60."""
    words = {"<pad>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, 40)}, "<end>": HIGHEST}
    base = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")


TEXTS = [{"prompt": "w2 w3 w4 ", "completion": "w5 w6"}, {"prompt": "w7 w8 ", "completion": "w9"}] * 4


def test_sizes_come_from_the_ids(holes):
    assert len(holes) < tokenizer_size(holes) == HIGHEST + 1
    assert compared_vocabulary(holes, student=tiny_model(1), teacher=tiny_model(2)) == HIGHEST + 1
    assert compared_vocabulary(holes, student=tiny_model(1), cache=50) == 50
    holes.add_tokens(["<more>"])
    assert tokenizer_size(holes) == max(holes.get_vocab().values()) + 1


def test_a_run_compares_and_generates_every_token(holes, tmp_path):
    student = tiny_model(1)
    with torch.no_grad():  # one that wants to end at once
        student.lm_head.weight.zero_()
        student.lm_head.weight[HIGHEST] = 1.0
        student.model.norm.weight.fill_(1.0)
        student.model.embed_tokens.weight.abs_()
    rows = Dataset.from_list(TEXTS)
    trainer = tiny_trainer(
        tiny_config(tmp_path, ce_weight=0.5, max_steps=2), processing_class=holes, model=tiny_model(3),
        train_dataset=rows, eval_dataset=rows,
    )  # fmt: skip
    trainer.train()
    assert trainer.vocab_size == HIGHEST + 1 and all(map(math.isfinite, logged(trainer, "loss")))
    own = tiny_trainer(
        tiny_config(tmp_path, policy="on_policy"), processing_class=holes, model=student, train_dataset=rows,
        eval_dataset=None,
    )  # fmt: skip
    assert any(HIGHEST in answer for answer in own.rollouts.student([[2, 3], [4, 5, 6], [7], [8]], [1, 2, 3, 4]))


def test_evaluation_compares_what_training_does(tmp_path, holes):
    """Entries behind the tokenizer's ids are no part of either distribution."""
    student, teacher = tiny_model(1), tiny_model(2)
    trainer = tiny_trainer(
        tiny_config(tmp_path), processing_class=holes, model=student, teacher=teacher,
        train_dataset=Dataset.from_list(TEXTS), eval_dataset=Dataset.from_list(TEXTS),
    )  # fmt: skip
    found = evaluate_student(student, trainer.eval_dataset, holes, teacher=teacher).kl
    with torch.no_grad():
        for model in (student, teacher):
            model.lm_head.weight[HIGHEST + 1 :] *= 30
    assert evaluate_student(student, trainer.eval_dataset, holes, teacher=teacher).kl == pytest.approx(found, rel=1e-5)
    assert trainer.evaluate()["eval_divergence"] == pytest.approx(found, rel=1e-5)


def test_padding_is_any_id_that_all_models_know(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == VOCAB
    assert padding_id(tokenizer) == VOCAB and padding_id(tokenizer, tiny_model(1), None) == 0
    assert padding_id(tokenizer, tiny_model(1, vocab=VOCAB + 1), tiny_model(2)) == 0
    for policy in ("dataset", "on_policy", "teacher_responses"):
        trainer = tiny_trainer(tiny_config(tmp_path, policy=policy, max_steps=2), processing_class=tokenizer)
        trainer.train()
        assert all(map(math.isfinite, logged(trainer, "loss")))
    trainer.save_model(str(tmp_path / "final"))
    # A padding id without a row would make a model that does not load.
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "final").config.pad_token_id == 0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((VOCAB, VOCAB + 8), r"beyond the embedding of the student, which has 64 rows"),
        ((VOCAB + 8, VOCAB), r"beyond the embedding of the teacher, which has 64 rows"),
    ],
)
def test_a_token_that_a_model_lacks_is_named_at_the_start(tmp_path, sizes, message):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    rows = token_rows(5).to_list()
    rows[3]["input_ids"][1] = VOCAB
    student, teacher = (tiny_model(seed, vocab=size) for seed, size in enumerate(sizes))
    with pytest.raises(ValueError, match=rf"train_dataset, row 4: token id 64 \('<new>'\) is {message}"):
        tiny_trainer(
            tiny_config(tmp_path), processing_class=tokenizer, model=student, teacher=teacher,
            train_dataset=Dataset.from_list(rows),
        )  # fmt: skip


def test_masked_ids_beyond_the_compared_entries_are_legal():
    """The models know an id that the tokenizer does not: legal in a prompt, no target."""
    rows = token_rows(3).to_list()
    rows[1]["input_ids"][1] = VOCAB + 3
    big = {"student": tiny_model(1, vocab=VOCAB + 8), "teacher": None}
    check_dataset_ids(Dataset.from_list(rows), "data", tiny_tokenizer(), models=big, vocab_size=VOCAB)
    rows[2]["input_ids"][-1] = VOCAB + 3
    with pytest.raises(ValueError, match="data, row 3: .*is a target, and only the first 64 entries"):
        check_dataset_ids(Dataset.from_list(rows), "data", tiny_tokenizer(), models=big, vocab_size=VOCAB)
    rows[2]["input_ids"][0] = -1
    with pytest.raises(ValueError, match="data, row 3: token id -1 .*is no id"):
        check_dataset_ids(Dataset.from_list(rows), "data", tiny_tokenizer(), models=big, vocab_size=None)


def test_plain_text_with_unknown_tokens_is_refused(tmp_path):
    text = Dataset.from_dict({"input_ids": [[4, 5, VOCAB + 1]]})
    with pytest.raises(ValueError, match="lm_dataset in blocks, row 1: token id 65"):
        tiny_trainer(tiny_config(tmp_path), lm_dataset=text)


def test_a_cache_over_too_few_entries_is_not_reused(tmp_path, holes):
    teacher = tiny_model(2)
    teacher.save_pretrained(tmp_path / "teacher")
    holes.save_pretrained(tmp_path / "teacher")
    Dataset.from_list(TEXTS).to_json(tmp_path / "rows.jsonl")
    settings = CaptureSettings(
        str(tmp_path / "teacher"), DatasetSettings(str(tmp_path / "rows.jsonl")), tmp_path / "cache",
        max_prompt_length=16, max_length=32,
    )  # fmt: skip
    capture(settings, processes=Processes(0, 1, 0))
    spec = TeacherCache.open(tmp_path / "cache").spec
    assert spec.compression.vocab_size == HIGHEST + 1
    parts = dict(
        processing_class=holes,
        teacher=str(tmp_path / "cache"),
        train_dataset=Dataset.from_list(TEXTS),
        eval_dataset=None,
    )
    tiny_trainer(tiny_config(tmp_path), **parts)
    # As one was written when tokens were counted in place of ids.
    manifest = Manifest.read(tmp_path / "cache" / MANIFEST)
    details = {name: value for name, value in spec.details.items() if name != "tokenizer_size"}
    old = replace(spec, compression=replace(spec.compression, vocab_size=len(holes)), details=details)
    replace(manifest, spec=old).write(tmp_path / "cache" / MANIFEST)
    with pytest.raises(CacheMismatch, match=f"first {len(holes)} entries.*go up to {HIGHEST}.*Capture again"):
        tiny_trainer(tiny_config(tmp_path), **parts)


def test_sizes_of_adapted_models():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        tiny_model(1), LoraConfig(target_modules=["embed_tokens", "lm_head"], task_type="CAUSAL_LM")
    )
    assert embedding_size(adapted) == VOCAB and compared_vocabulary(tiny_tokenizer(), student=adapted) == VOCAB
    saved = get_peft_model(
        tiny_model(1), LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    )
    assert embedding_size(saved) == VOCAB and compared_vocabulary(tiny_tokenizer(), student=saved) == VOCAB
