"""Arguments of the wrong class are refused at the door, by name and with the remedy."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from trainer_world import VOCAB, tiny_config, tiny_model, tiny_tokenizer, tiny_trainer, token_rows
from transformers import ProcessorMixin, TrainerCallback, TrainingArguments

from distillm_ext.generation import full_weights
from distillm_ext.models.checks import check_apart, check_causal, check_complete
from distillm_ext.training import DistillationTrainer

SMALL = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=64,
)  # fmt: skip
T5 = dict(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
LLAMA = transformers.LlamaConfig(**SMALL, num_key_value_heads=2)
MODELS = {
    "the name 'a/b'": lambda: "a/b",
    "list": lambda: [tiny_model(1)],
    "encoder-decoder": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "encoder-decoder, without its head": lambda: transformers.T5Model(transformers.T5Config(**T5)),
    "masked language model": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
    "as an encoder": lambda: transformers.BertLMHeadModel(transformers.BertConfig(**SMALL)),
    "without a language-model head": lambda: transformers.LlamaModel(LLAMA),
    "classifier": lambda: transformers.LlamaForSequenceClassification(LLAMA),
    "token classifier": lambda: transformers.LlamaForTokenClassification(LLAMA),
    "Linear": lambda: torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("name", ["model", "teacher"])
@pytest.mark.parametrize("kind", MODELS)
def test_models_of_another_kind(tmp_path, name, kind):
    with pytest.raises(
        TypeError, match=f"^{name}: expected a causal language model.*{kind.split(',')[0]}|^teacher: .*'a/b'"
    ):
        tiny_trainer(tiny_config(tmp_path), **{name: MODELS[kind]()})


@pytest.mark.parametrize(
    "model",
    [
        transformers.BertLMHeadModel(transformers.BertConfig(**SMALL, is_decoder=True)),
        transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2)),
        get_peft_model(tiny_model(1), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")),
        type("OwnModel", (transformers.LlamaForCausalLM,), {})(LLAMA),
    ],
)  # fmt: skip
def test_causal_models_pass(model):
    check_causal(model, "model")


def test_parameters_of_the_student_are_not_the_teachers(tmp_path):
    base = tiny_model(1)
    student = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"teacher: shares parameters with model \('model.embed_tokens.weight'.*copy"):
        tiny_trainer(tiny_config(tmp_path), model=student, teacher=base)
    one, other = tiny_model(1), tiny_model(2)
    # A view of the same memory is the same parameter.
    other.lm_head.weight = torch.nn.Parameter(one.lm_head.weight.detach()[:])
    with pytest.raises(ValueError, match="'lm_head.weight' is the student's 'lm_head.weight'"):
        check_apart(one, other)
    check_apart(one, copy.deepcopy(one))
    with pytest.raises(ValueError, match="same object"):
        check_apart(one, one)


class TinyProcessor(ProcessorMixin):
    attributes = ["tokenizer"]
    tokenizer_class = "PreTrainedTokenizerFast"

    def __init__(self, tokenizer=None, chat_template=None):
        super().__init__(tokenizer, chat_template=chat_template)


def test_of_a_processor_its_tokenizer_is_taken(tmp_path):
    tokenizer = tiny_tokenizer()
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    trainer = tiny_trainer(tiny_config(tmp_path), processing_class=TinyProcessor(tokenizer, chat_template=template))
    assert trainer.processing_class.get_vocab() == tokenizer.get_vocab()
    assert trainer.processing_class.chat_template == template and tokenizer.chat_template is None


@pytest.mark.parametrize("value", [None, "a/b", tiny_tokenizer().backend_tokenizer, object()])
def test_tokenizers_of_another_kind(tmp_path, value):
    with pytest.raises(TypeError, match="processing_class: expected the tokenizer.*AutoTokenizer"):
        tiny_trainer(tiny_config(tmp_path), processing_class=value)


ROWS = token_rows(4)
DATASETS = {
    "list; make one with datasets.Dataset.from_list": ROWS.to_list(),
    "IterableDataset; streams are not supported": ROWS.to_iterable_dataset(),
    r"DatasetDict; choose one of its splits \(train\)": DatasetDict(train=ROWS),
    "str; load it with distillm_ext.training.load_rows": "train.jsonl",
    "the class Dataset": Dataset,
}


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset", "lm_dataset"])
@pytest.mark.parametrize("message", DATASETS)
def test_data_sets_of_another_kind(tmp_path, name, message):
    with pytest.raises(TypeError, match=f"{name}: expected a datasets.Dataset, got {message}"):
        tiny_trainer(tiny_config(tmp_path), **{name: DATASETS[message]})


def test_a_split_of_another_kind_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"eval_dataset\[b\]: expected a datasets.Dataset, got list"):
        tiny_trainer(tiny_config(tmp_path), eval_dataset={"a": ROWS, "b": ROWS.to_list()})


def test_other_arguments(tmp_path):
    with pytest.raises(TypeError, match="args: expected a DistillationConfig.*got TrainingArguments"):
        DistillationTrainer(tiny_model(1), tiny_model(2), TrainingArguments(str(tmp_path), use_cpu=True), ROWS)
    args = tiny_config(tmp_path)
    with pytest.raises(TypeError, match="generation_engine: expected an Engine.*got str"):
        tiny_trainer(args, generation_engine="vllm")
    with pytest.raises(TypeError, match="teacher_cache: .*a model is passed as teacher"):
        tiny_trainer(args, teacher=None, teacher_cache=tiny_model(2))
    with pytest.raises(TypeError, match="teacher: expected a causal language model, or a cache"):
        tiny_trainer(args, teacher=None)


def test_a_checkpoint_without_all_weights_is_refused():
    model = tiny_model(1)
    check_complete(model, {"missing_keys": {"rotary.inv_freq"}, "mismatched_keys": set()}, "'a'")
    with pytest.raises(ValueError, match=r"'a': the checkpoint lacks 1 weights of LlamaForCausalLM \(lm_head.weight\)"):
        check_complete(model, {"missing_keys": {"lm_head.weight"}}, "'a'")
    with pytest.raises(ValueError, match="lacks 1 weights"):
        check_complete(model, {"mismatched_keys": {("lm_head.weight", (1,), (2,))}}, "'a'")


def test_models_inside_wrappers_that_cannot_be_trained(tmp_path):
    options = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    nested = get_peft_model(get_peft_model(tiny_model(1), options), options)
    with pytest.raises(TypeError, match="model: an adapter stands around a model that has one.*merge_and_unload"):
        tiny_trainer(tiny_config(tmp_path), model=nested)
    mixed = get_peft_model(tiny_model(1), options, mixed=True)
    for call in (lambda: tiny_trainer(tiny_config(tmp_path), model=mixed), lambda: list(full_weights(mixed))):
        with pytest.raises(TypeError, match="model: adapters of mixed kinds"):
            call()
    wrapped = torch.nn.DataParallel(tiny_model(1))
    with pytest.raises(TypeError, match=r"teacher: .*got it inside DataParallel; pass the model itself"):
        tiny_trainer(tiny_config(tmp_path), teacher=wrapped)


def test_memory_beside_the_students_is_not_shared():
    one, other = tiny_model(1), tiny_model(2)
    both = torch.zeros(2, *one.lm_head.weight.shape)
    one.lm_head.weight, other.lm_head.weight = (torch.nn.Parameter(part) for part in both)
    check_apart(one, other)
    other.lm_head.weight = torch.nn.Parameter(both.flatten()[8 : 8 + both[0].numel()].view(both[0].shape))
    with pytest.raises(ValueError, match="'lm_head.weight' is the student's 'lm_head.weight'"):
        check_apart(one, other)


def test_float64_on_one_side_and_nothing_to_train(tmp_path):
    with pytest.raises(ValueError, match="teacher: a student of float64 and a teacher of float32"):
        tiny_trainer(tiny_config(tmp_path), model=tiny_model(1).double())
    trainer = tiny_trainer(tiny_config(tmp_path), model=tiny_model(1).requires_grad_(False))
    with pytest.raises(ValueError, match="model: no parameter is trainable"):
        trainer.train()
    with pytest.raises(TypeError, match="callbacks: expected a list"):
        tiny_trainer(tiny_config(tmp_path), callbacks=TrainerCallback())


def test_a_set_handed_to_evaluate_is_checked_like_the_trainers_own(tmp_path):
    trainer = tiny_trainer(tiny_config(tmp_path))
    rows = token_rows(3).to_list()
    rows[1]["input_ids"][-1] = VOCAB + 5
    with pytest.raises(ValueError, match="eval_dataset, row 2: token id 69"):
        trainer.evaluate(Dataset.from_list(rows))
    long = {"input_ids": [5] * 200, "loss_mask": [0] + [1] * 199, "prompt_length": 1}
    with pytest.raises(ValueError, match="test_dataset: row 1 has 200 tokens, more than the 128 positions"):
        trainer.predict(Dataset.from_list([long]))
