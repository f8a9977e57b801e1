"""No text goes beyond the positions of a model or the run's `max_length`: refused at start, stopped in generation."""

import peft
import pytest
import torch
from datasets import Dataset
from trainer_world import EOS, tiny_config, tiny_model, tiny_tokenizer, tiny_trainer, token_rows
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    OPTConfig,
    RobertaConfig,
    RobertaForCausalLM,
)

from distillm_ext.generation import LocalEngine, SamplingParams, generate
from distillm_ext.generation.positions import check_positions, position_limit
from distillm_ext.training.rollouts.rollouts import EngineResponses


def short_model(positions=24, seed=3):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=positions, bos_token_id=1, eos_token_id=EOS
        )
    )


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (GPT2Config(n_positions=77), 77),
        (MptConfig(max_seq_len=55), 55),
        (OPTConfig(max_position_embeddings=66), 66),
        (LlamaConfig(max_position_embeddings=88, rope_parameters={"rope_type": "linear", "factor": 2.0}), 88),
        (MambaConfig(), None),
    ],
)
def test_the_limit_of_a_configuration(config, limit):
    assert position_limit(config) == limit


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_max_length_beyond_a_model_is_refused_at_start(tmp_path, who):
    part = {"model" if who == "student" else "teacher": short_model(24)}
    with pytest.raises(ValueError, match=rf"max_length: expected at most 24, the positions of the {who} \(GPT2LMHead"):
        tiny_trainer(tiny_config(tmp_path, max_length=25), **part)
    tiny_trainer(tiny_config(tmp_path, max_length=24), **part)


def test_the_setting_and_wrappers_are_seen_through():
    model = peft.get_peft_model(short_model(24), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(ValueError, match=r"--max-length: expected at most 24, the positions of the model"):
        check_positions({"teacher": None, "model": model}, 30, setting="--max-length")


def long_row(prompt, response):
    return {
        "input_ids": [1] * prompt + [5] * (response - 1) + [EOS],
        "loss_mask": [0] * prompt + [1] * response,
        "prompt_length": prompt,
    }


def test_token_rows_beyond_a_model_are_refused_by_number(tmp_path):
    rows = Dataset.from_list([*token_rows(5), long_row(4, 26), *token_rows(2)])
    message = r"train_dataset: row 6 has 30 tokens, more than the 24 positions of the teacher"
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tiny_config(tmp_path, max_length=24), teacher=short_model(24), train_dataset=rows)
    with pytest.raises(ValueError, match=r"eval_dataset\[hard\]: row 6 has 30 tokens"):
        tiny_trainer(
            tiny_config(tmp_path, max_length=24), teacher=short_model(24), eval_dataset={"hard": rows, "easy": rows}
        )


def test_a_prompt_that_fills_max_length_is_refused_where_it_is_answered(tmp_path):
    rows = Dataset.from_list([*token_rows(5), long_row(32, 2)])
    with pytest.raises(ValueError, match="train_dataset: the prompt of row 6 has 32 tokens.* max_length=32"):
        tiny_trainer(tiny_config(tmp_path, policy="on_policy"), train_dataset=rows)
    tiny_trainer(tiny_config(tmp_path, policy="dataset"), train_dataset=rows)


def test_responses_stop_at_max_length_and_are_otherwise_the_same():
    asked = []

    class Engine(LocalEngine):
        def generate(self, prompts, params, **options):
            asked.append(options["max_new_tokens"])
            return super().generate(prompts, params, **options)

    engine = Engine(tiny_model(1), shares_weights=True)
    prompts, seeds = [[1] * 5, [1, 7], [1] * 11], [4, 5, 6]
    settings = dict(params=SamplingParams(), eos_token_ids=(), max_new_tokens=8)
    long, short = (EngineResponses(engine, max_length=length, **settings)(prompts, seeds) for length in (64, 12))
    assert [len(answer) for answer in short] == [7, 8, 1] and [len(answer) for answer in long] == [8] * 3
    assert [answer[: len(kept)] for answer, kept in zip(long, short, strict=True)] == short
    assert asked == [[8, 8, 8], [7, 8, 1]]
    with pytest.raises(ValueError, match=r"prompts\[2\]: its 11 tokens leave no room .*max_length \(11\)"):
        EngineResponses(engine, max_length=11, **settings)(prompts, seeds)


def test_training_at_the_very_limit(tmp_path):
    """The longest text has as many tokens as GPT-2 has positions: one more would be an index out of range."""
    trainer = tiny_trainer(
        tiny_config(tmp_path, policy="on_policy", max_length=20, max_new_tokens=50, max_steps=2),
        model=short_model(20), teacher=short_model(20, seed=4),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2


VIRTUAL = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p_tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", VIRTUAL)
@pytest.mark.parametrize("argument", ["model", "teacher"])
def test_virtual_tokens_are_refused_at_start(tmp_path, kind, argument):
    adapted = peft.get_peft_model(tiny_model(1), VIRTUAL[kind])
    with pytest.raises(ValueError, match=rf"{argument}: its adapter \(P\w*_TUNING\) puts virtual tokens.*use LoRA"):
        tiny_trainer(tiny_config(tmp_path), **{argument: adapted})


def test_virtual_tokens_are_refused_in_evaluation():
    from distillm_ext.evaluation.metrics import evaluate_student

    adapted = peft.get_peft_model(tiny_model(1), VIRTUAL["prompt"])
    with pytest.raises(ValueError, match="student: its adapter"):
        evaluate_student(adapted, token_rows(2), tiny_tokenizer())


def test_positions_that_begin_behind_the_padding_token_are_refused():
    config = RobertaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, is_decoder=True
    )
    with pytest.raises(ValueError, match="RobertaForCausalLM numbers positions from its padding token"):
        generate(RobertaForCausalLM(config), torch.tensor([[5, 6]]), max_new_tokens=2)
