"""Logits at chosen positions: exact for each architecture, through every kind of head, with gradients."""

import logging

import pytest
import torch
from torch import nn
from trainer_world import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from distillm_ext.containers import TeacherHead
from distillm_ext.models.frozen_teacher import ModelTeacher
from distillm_ext.models.logit_reader import HeadTransform, LogitReader, TokenBatch, head_logits, replaced_forward
from distillm_ext.models.student_forward import StudentForward

SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
ARCHITECTURES = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL,
    "mistral": SMALL,
    "gemma2": SMALL | dict(final_logit_softcapping=0.5),
    "gemma3_text": SMALL,
    "cohere": SMALL | dict(logit_scale=0.0625),
    "granite": SMALL | dict(logits_scaling=8.0),
    "gpt2": dict(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "gpt_neox": SMALL,
    "phi": SMALL,
    "opt": dict(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=64,
    ),
}  # fmt: skip


def make_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return TokenBatch(ids, mask, torch.tensor([2, 3, 7, 10, 13, 18, 25]))


def full_logits(model, batch):
    return batch.select(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_gradients_equal_the_models_own(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **ARCHITECTURES[name])).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # away from uniform logits, so that a softcap or a scale shows
    batch, student = make_batch(), StudentForward(model, torch.no_grad)
    assert student.reader.verify([5, 6, 7, 8], name)
    expected = full_logits(model, batch)
    torch.testing.assert_close(LogitReader(model).logits(batch), expected)

    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * upstream).sum().backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    student.autocast = torch.enable_grad
    student(model, [batch], lambda logits: (logits[0] * upstream).sum()).backward()
    for key, parameter in model.named_parameters():
        if key in gradients:
            torch.testing.assert_close(
                parameter.grad, gradients[key], rtol=1e-9, atol=1e-9 * gradients[key].abs().max()
            )


def test_the_head_sees_the_chosen_positions_only():
    model, batch = tiny_model(0), make_batch()
    seen = []

    def record(module, args, output):
        seen.append((tuple(args[0].shape), output.shape))

    record.__module__ = "torch.distributed.fsdp"  # whose hooks only care for the weight
    model.lm_head.register_forward_hook(record)
    teacher = ModelTeacher(tiny_model(1), device=torch.device("cpu"))
    teacher.model.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    teacher.logits(batch)
    StudentForward(model, torch.enable_grad)(model, [batch], lambda logits: logits[0].sum())
    # The student's head returns the loss, a scalar.
    assert seen == [(7, 32), ((7, 32), torch.Size([]))]


@pytest.mark.parametrize("splits", [True, False])
def test_several_batches_share_one_call(splits):
    model = tiny_model(0)
    student = StudentForward(model, torch.enable_grad)
    student.reader.splits = splits
    first, second = make_batch(), make_batch(1)
    found = []
    student(model, [first, second], lambda logits: found.extend(logits) or logits[0].sum())
    torch.testing.assert_close(found[0], full_logits(model, first))
    torch.testing.assert_close(found[1], full_logits(model, second))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused_rows_are_the_heads_own(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **ARCHITECTURES[name])).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    batches, seen = [make_batch(), make_batch(1)], []
    student, teacher = StudentForward(model, torch.enable_grad), ModelTeacher(model, device=torch.device("cpu"))
    student(model, batches, lambda rows: seen.extend(rows) or rows[0].hidden.sum(), fused=True)
    for rows, batch in zip([*seen, teacher.outputs(batches[0])], [*batches, batches[0]], strict=True):
        assert rows.hidden.dim() == 2 and rows.weight is model.get_output_embeddings().weight
        torch.testing.assert_close(head_logits(rows), full_logits(model, batch))


class OtherLinear(nn.Linear):
    """A head whose product is its own, as a quantised or low-rank one's."""

    def forward(self, hidden):
        return super().forward(hidden) + 1.0


def hooked(head):
    head.forward = head.forward


def converted(head):
    head.weight = nn.Parameter(head.weight.to(torch.float8_e4m3fn), requires_grad=False)


def halve(module, args, output):
    return output * 0.5


class Wrapped(torch.Tensor):
    """A weight that computes its own way, as a quantised one's."""


def wrapped(head):
    head.weight = nn.Parameter(head.weight.detach().as_subclass(Wrapped), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda head: setattr(head, "__class__", OtherLinear), "a OtherLinear, not a plain torch.nn.Linear"),
        (hooked, "forward of its head is replaced"),
        (converted, "float8_e4m3fn weights"),
        (lambda head: head.register_forward_hook(halve), "has forward hooks"),
        (lambda head: head.register_forward_pre_hook(lambda module, args: args), "has forward hooks"),
        (wrapped, "a Wrapped, not a plain tensor"),
    ],
)
def test_heads_that_do_not_fuse_say_why_once(change, reason, caplog):
    model = tiny_model(0)
    change(model.lm_head)
    reader = LogitReader(model)
    with caplog.at_level(logging.WARNING):
        assert not reader.fuses() and not reader.fuses()
    assert len(caplog.records) == 1 and reason in caplog.text


@pytest.mark.parametrize("fused", [False, True])
def test_hooks_on_the_head_see_logits(fused):
    """Neither the loss nor only its rows: what a hook makes of the logits is what the loss reads, on both sides."""
    model, batch, seen = tiny_model(0), make_batch(), []
    model.lm_head.register_forward_hook(halve)
    student, teacher = StudentForward(model, torch.enable_grad), ModelTeacher(model, device=torch.device("cpu"))
    student(model, [batch], lambda rows: seen.extend(rows) or rows[0].sum(), fused=fused)
    expected = full_logits(model, batch)
    for rows in (*seen, teacher.outputs(batch)):
        torch.testing.assert_close(rows, expected)


def test_a_head_of_another_dtype_is_verified_under_autocast():
    model = tiny_model(0).bfloat16()
    model.lm_head.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert LogitReader(model).verify([5, 6, 7], "student")


def test_a_head_that_does_not_fuse_gives_logits():
    model, batch, seen = tiny_model(0), make_batch(), []
    model.lm_head.__class__ = OtherLinear
    student, teacher = StudentForward(model, torch.enable_grad), ModelTeacher(model, device=torch.device("cpu"))
    student(model, [batch], lambda rows: seen.extend(rows) or rows[0].sum(), fused=True)
    for rows in (*seen, teacher.outputs(batch)):
        torch.testing.assert_close(rows, full_logits(model, batch))


def test_a_teacher_elsewhere_gives_logits():
    teacher = ModelTeacher(tiny_model(0), device=torch.device("cpu"))
    assert isinstance(teacher.outputs(make_batch()), TeacherHead)
    teacher.device = torch.device("meta")
    assert isinstance(teacher.outputs(make_batch()), torch.Tensor)


def test_unverified_splits_do_not_fuse():
    reader = LogitReader(tiny_model(0))
    assert reader.fuses()
    reader.splits = False
    assert not reader.fuses()


def test_a_wrong_transform_falls_back_with_a_warning(caplog):
    model, batch = tiny_model(0), make_batch()
    reader = LogitReader(model)
    reader.transform = HeadTransform(scale=2.0)
    with caplog.at_level(logging.WARNING):
        assert not reader.verify([5, 6, 7], "student")
    assert "student" in caplog.text and "full logits" in caplog.text
    torch.testing.assert_close(reader.logits(batch), full_logits(model, batch))


def test_an_unsplittable_model_computes_full_logits(caplog):
    model, batch = tiny_model(0), make_batch()
    model.get_output_embeddings = lambda: None
    reader = LogitReader(model)
    with caplog.at_level(logging.WARNING):
        assert not reader.verify([5, 6, 7], "teacher")
    assert "no separate backbone" in caplog.text
    torch.testing.assert_close(reader.logits(batch), full_logits(model, batch))


def test_verify_leaves_the_training_mode():
    model = tiny_model(0).train()
    LogitReader(model).verify([5, 6], "student")
    assert model.training


def test_forward_is_put_back_even_after_an_error():
    model = tiny_model(0)
    own = lambda *args, **kwargs: "own"  # noqa: E731
    model.forward = own
    with pytest.raises(ZeroDivisionError), replaced_forward(model, lambda: 1 / 0):
        model.forward()
    assert model.forward is own
    del model.forward
    with replaced_forward(model, lambda: "other"):
        pass
    assert "forward" not in model.__dict__


def test_autocast_of_the_run_is_used():
    model, dtypes = tiny_model(0), []
    student = StudentForward(model, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    student(model, [make_batch()], lambda logits: dtypes.append(logits[0].dtype) or logits[0].float().sum()).backward()
    assert dtypes == [torch.bfloat16] and model.lm_head.weight.grad.dtype == torch.float32


def test_teacher_is_frozen_cast_and_in_evaluation_mode():
    model = tiny_model(0).train()
    teacher = ModelTeacher(model, device=torch.device("cpu"), dtype="bfloat16")
    logits = teacher.logits(make_batch())
    assert logits.dtype == torch.bfloat16 and not logits.requires_grad and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    kept = ModelTeacher(tiny_model(0), device=torch.device("cpu"), dtype="auto")
    assert kept.logits(make_batch()).dtype == torch.float32


def test_teacher_of_the_wrong_kind():
    with pytest.raises(TypeError, match="teacher: expected a causal language model"):
        ModelTeacher("gpt2", device=torch.device("cpu"))
