"""Tokenizers, chat templates and a conversation for tests of the tokenisation of rows."""

from __future__ import annotations

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distillm_ext.data.tokenise import prepare_dataset

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "world"},
    {"role": "user", "content": "hello hello"},
    {"role": "assistant", "content": "the end"},
]


def make_bpe(template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE that merges over any border it can: "helloworld" is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>", "<bos>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["helloworld hello world helloworld the end"] * 20, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<eos>", **special})
    made.chat_template = template
    return made


def prepare(rows, tokenizer, **options):
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return prepare_dataset(dataset, tokenizer, **{"max_prompt_length": 64, "max_length": 128, **options})


def targets(row):
    return [token for token, flag in zip(row["input_ids"], row["loss_mask"], strict=True) if flag]
