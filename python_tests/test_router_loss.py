"""What a model adds to its loss by itself is part of what is trained: its own formula and coefficient, or a warning."""

import importlib
import logging

import pytest
import torch
from datasets import concatenate_datasets
from trainer_world import expected_gradients, first_step, logged, tiny_config, tiny_model, tiny_trainer, token_rows
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from distillm_ext.containers import LinearHead
from distillm_ext.models.logit_reader import LogitReader, TokenBatch
from distillm_ext.models.router_loss import OwnLoss
from distillm_ext.models.student_forward import StudentForward

SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    output_router_logits=True, router_aux_loss_coef=0.7, num_experts_per_tok=2,
)  # fmt: skip
EXPERTS = dict(num_experts=4, moe_intermediate_size=16)
FAMILIES = {
    "mixtral": SMALL | dict(num_local_experts=4),
    "qwen2_moe": SMALL | EXPERTS | dict(shared_expert_intermediate_size=16, decoder_sparse_step=1, mlp_only_layers=[]),
    "qwen3_moe": SMALL | EXPERTS | dict(head_dim=16, decoder_sparse_step=1, mlp_only_layers=[]),
    "olmoe": SMALL | dict(num_experts=4),
    "gpt_oss": SMALL | dict(head_dim=16, num_local_experts=4, sliding_window=8),
    "granitemoe": SMALL | dict(num_local_experts=4),
    "phimoe": SMALL | dict(num_local_experts=4, router_jitter_noise=0.0),
    "jetmoe": dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_key_value_heads=2, kv_channels=16,
        num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, aux_loss_coef=0.7,
    ),
    "dbrx": dict(
        vocab_size=64, d_model=32, n_heads=2, n_layers=2, max_seq_len=64, output_router_logits=True,
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=16, moe_num_experts=4, moe_top_k=2, moe_loss_weight=0.7),
    ),
}  # fmt: skip


def moe(name, **changed):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(FAMILIES[name] | changed))
    config._experts_implementation = "eager"  # the only one that takes float64
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)  # uneven experts: the balance of even ones has no gradient
    return model


def padded_batch():
    ids = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return TokenBatch(ids, mask, torch.tensor([2, 3, 7, 10, 13, 18, 25]))


def nothing(rows):
    return (rows[0].hidden if isinstance(rows[0], LinearHead) else rows[0]).sum() * 0


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("way", ["fused", "head", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_term_and_its_gradient_are_those_of_the_models_own_loss(name, way):
    model, batch = moe(name).double(), padded_batch()
    student = StudentForward(model, torch.enable_grad)
    student.reader.splits = way != "full"
    student.own.probe([5, 6, 7, 8, 9], "student")
    assert student.own.active
    model.train()
    torch.manual_seed(1)  # PhiMoE's router draws
    own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.input_ids, use_cache=False)
    added = own.loss - model.loss_function(own.logits, batch.input_ids, vocab_size=64)
    added.backward()
    expected = gradients(model)
    assert any("router" in key or "gate" in key for key in expected)
    model.zero_grad()
    losses = []
    torch.manual_seed(1)
    loss = student(
        model, [batch], lambda rows: nothing(rows) + losses[0].term, fused=way == "fused", model_losses=losses
    )
    loss.backward()
    found = gradients(model)
    assert losses[0].name == "router"
    torch.testing.assert_close(losses[0].term.double(), added.double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses[0].value, own.aux_loss)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-6, atol=1e-9)
    assert "_loss_function" not in model.__dict__ and "forward" not in model.lm_head.__dict__


@pytest.mark.parametrize("changed", [dict(router_aux_loss_coef=0.0), dict(output_router_logits=False)])
def test_nothing_is_added_where_the_configuration_asks_for_nothing(changed, caplog):
    student = StudentForward(moe("mixtral", **changed), torch.enable_grad)
    student.own.probe([5, 6, 7], "student")
    assert not student.own.active and not caplog.records


@pytest.fixture
def counted(monkeypatch):
    """Calls of Mixtral's own formula."""
    module = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    calls, formula = [], module.load_balancing_loss_func

    def counting(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return formula(*args, **kwargs)

    monkeypatch.setattr(module, "load_balancing_loss_func", counting)
    return calls


@pytest.mark.parametrize("policy", ["dataset", "on_policy"])
def test_only_training_passes_of_the_student_pay_for_it(tmp_path, counted, policy):
    settings = dict(max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2, policy=policy)
    args = tiny_config(tmp_path, eval_strategy="steps", eval_steps=1, **settings)
    trainer = tiny_trainer(args, model=moe("mixtral"), teacher=moe("mixtral"))
    trainer.teacher.reader.splits = False
    counted.clear()
    trainer.train()
    assert counted == [True] * 4
    for entry in trainer.state.log_history:
        if "loss_router" in entry:
            assert entry["loss"] == pytest.approx(entry["loss_divergence"] + 0.7 * entry["loss_router"], rel=1e-4)
    assert len(logged(trainer, "loss_router")) == 2


@pytest.mark.parametrize("text", [False, True])
def test_a_step_takes_the_mean_over_its_forward_passes(tmp_path, text):
    """Two micro-batches with the same rows have the gradient of one; a plain text is one more pass."""
    half = token_rows(2)
    rows = concatenate_datasets([half, half])
    settings = dict(max_steps=1, max_grad_norm=0.0, train_sampling_strategy="sequential", ce_weight=0.0)
    texts = half.select_columns(["input_ids"]) if text else None
    found = []
    for batch, steps in ((2, 2), (4, 1)):
        args = tiny_config(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, **settings)
        trainer = tiny_trainer(args, model=moe("mixtral"), train_dataset=rows, lm_dataset=texts)
        trainer.train()
        found.append(logged(trainer, "loss_router")[0])
    assert found[0] == pytest.approx(found[1], rel=0.2 if text else 1e-5)
    assert 1.5 < found[0] < 3  # about the number of experts per token, however many passes a step has


def test_gradients_of_a_step_are_those_of_divergence_and_balance(tmp_path):
    model = moe("mixtral")
    found, _ = first_step(tmp_path / "with", model=model)
    plain, _ = first_step(tmp_path / "without", model=moe("mixtral", router_aux_loss_coef=0.0))
    args = tiny_config(tmp_path / "batch", max_steps=1)
    trainer = tiny_trainer(args, rows=8, model=moe("mixtral"))
    batch = next(iter(trainer.get_train_dataloader()))

    def balance(model):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        return 0.7 * model(input_ids=ids, attention_mask=mask, use_cache=False).aux_loss

    expected, _ = expected_gradients(balance, moe("mixtral"))
    for key, gradient in expected.items():
        if key.endswith("gate.weight"):
            assert gradient.abs().max() > 1e-4
            torch.testing.assert_close(found[key] - plain[key], gradient, rtol=1e-2, atol=1e-5)


class WithPenalty(LlamaForCausalLM):
    """Adds to its loss what only its hidden states tell."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, labels=labels, output_hidden_states=True, **kwargs)
        if labels is not None and self.training:
            output.loss = output.loss + 0.1 * output.hidden_states[-1].float().pow(2).mean()
        return output


class WithLogitPenalty(LlamaForCausalLM):
    """Adds to its loss what only its logits tell."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            output.loss = output.loss + self.config.z_loss_coef * output.logits.logsumexp(-1).pow(2).mean()
        return output


class WithSecondHead(LlamaForCausalLM):
    """Predicts a second token, whose loss is of the same function as the first one's."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            shifted = labels.roll(-1, 1)
            output.loss = output.loss + 0.3 * self.loss_function(output.logits, shifted, vocab_size=64)
        return output


class Broken(LlamaForCausalLM):
    """Fails when it is asked for a loss."""

    def forward(self, *args, labels=None, **kwargs):
        if labels is not None:
            raise NotImplementedError("no loss here")
        return super().forward(*args, **kwargs)


def of_class(cls, **config):
    model = cls(tiny_model(1, **config).config)
    model.load_state_dict(tiny_model(1).state_dict())
    return model


def test_a_term_of_an_unknown_kind_is_added_too(tmp_path):
    trainer = tiny_trainer(tiny_config(tmp_path, max_steps=1), model=of_class(WithPenalty))
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss_model"] > 0
    assert entry["loss"] == pytest.approx(entry["loss_divergence"] + entry["loss_model"], rel=1e-4)


@pytest.mark.parametrize(
    ("cls", "said"),
    [(WithLogitPenalty, "z_loss_coef=0.01"), (WithSecondHead, "term of its own"), (Broken, "no loss here")],
)
def test_a_term_that_cannot_be_added_is_named_once(tmp_path, caplog, cls, said):
    with caplog.at_level(logging.WARNING, logger="distillm_ext"):
        trainer = tiny_trainer(tiny_config(tmp_path, max_steps=2), model=of_class(cls, z_loss_coef=0.01))
        trainer.train()
    warnings = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(warnings) == 1 and cls.__name__ in warnings[0] and said in warnings[0]
    assert not any("loss_model" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("coefficient", [float("inf"), float("nan")])
def test_a_term_that_is_not_finite_is_not_left_out_silently(caplog, coefficient):
    model = of_class(WithLogitPenalty, z_loss_coef=coefficient)
    own = OwnLoss(LogitReader(model))
    with caplog.at_level(logging.WARNING, logger="distillm_ext"):
        own.probe([5, 6, 7], "student")
    assert not own.active
    (said,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert f"z_loss_coef={coefficient}" in said
