"""A world small enough for tests of the trainer: word tokenizer of 64 ids, two-layer Llamas, random token rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from distillm_ext.training import DistillationConfig, DistillationTrainer

VOCAB = 64
EOS = 2
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def tiny_tokenizer(size: int = VOCAB) -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_model(
    seed: int, *, layers: int = 1, vocab: int = VOCAB, tied: bool = False, **config: Any
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    # A wide initialisation: with the default one all logits are nearly equal and no test could tell models apart.
    settings = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1) | config
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, num_hidden_layers=layers, max_position_embeddings=128, initializer_range=0.3,
            tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1, eos_token_id=EOS, **settings,
        )
    )  # fmt: skip


def token_rows(count: int, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        prompt = [1, *rng.integers(4, VOCAB, rng.integers(2, 7)).tolist()]
        response = [*rng.integers(4, VOCAB, rng.integers(1, 9)).tolist(), EOS]
        mask = [0] * len(prompt) + [1] * len(response)
        rows.append({"input_ids": prompt + response, "loss_mask": mask, "prompt_length": len(prompt)})
    return Dataset.from_list(rows)


def tiny_config(output_dir: Path | str, **overrides: Any) -> DistillationConfig:
    defaults: dict[str, Any] = dict(
        use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1, learning_rate=1e-2,
        lr_scheduler_type="constant", per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=4, seed=7,
        max_prompt_length=16, max_length=32, max_new_tokens=6,
    )  # fmt: skip
    return DistillationConfig(output_dir=str(output_dir), **(defaults | overrides))


def adaptive(**overrides: Any) -> dict[str, Any]:
    """Settings under which data, fresh and replayed batches all occur within a few steps."""
    settings = dict(policy="adaptive_off_policy", sgo_initial=0.7, eval_strategy="steps", eval_steps=4)
    return settings | overrides


def tiny_trainer(args: DistillationConfig, *, rows: int = 16, **overrides: Any) -> DistillationTrainer:
    parts: dict[str, Any] = dict(
        model=tiny_model(1), teacher=tiny_model(2, layers=2), train_dataset=token_rows(rows),
        eval_dataset=token_rows(6, seed=1), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    return DistillationTrainer(args=args, **(parts | overrides))


def weights(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def logged(trainer: DistillationTrainer, key: str) -> list[Any]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class GradientRecorder(TrainerCallback):
    """Keeps the gradients of the first optimizer step, as they reach the optimizer."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            self.gradients = {
                name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None
            }


def response_logits(model, rows):
    """Logits and targets of all response tokens, one row at a time and without padding."""
    logits, targets = [], []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        mask = torch.tensor(row["loss_mask"][1:], dtype=torch.bool)
        logits.append(model(ids).logits[0, :-1][mask])
        targets.append(ids[0, 1:][mask])
    return torch.cat(logits), torch.cat(targets)


def first_step(tmp_path, *, model=None, **settings):
    """Gradients of the first optimizer step and its log."""
    recorder = GradientRecorder()
    model = model or tiny_model(1)
    lm_dataset, rows = settings.pop("lm_text", None), settings.pop("train_dataset", None)
    trainer = tiny_trainer(
        tiny_config(tmp_path, max_steps=1, max_grad_norm=0.0, **settings), model=model, callbacks=[recorder],
        lm_dataset=lm_dataset, train_dataset=token_rows(8) if rows is None else rows,
    )  # fmt: skip
    trainer.train()
    return recorder.gradients, trainer.state.log_history[0]


def assert_gradients_equal(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=tolerance * float(gradient.abs().max()))


def expected_gradients(loss_of, model):
    loss = loss_of(model)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, float(loss.detach())
