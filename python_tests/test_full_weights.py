"""Weights for an engine are those of the merged model, name by name and bit by bit, and the student stays as it is."""

import copy

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trainer_world import tiny_model
from transformers import Lfm2Config, Lfm2ForCausalLM

from distillm_ext.generation import full_weights

LORA = dict(r=4, task_type="CAUSAL_LM", init_lora_weights=False)
ADAPTERS = {
    "lora": peft.LoraConfig(target_modules=["q_proj", "down_proj"], **LORA),
    "dora": peft.LoraConfig(target_modules=["q_proj"], use_dora=True, **LORA),
    "rslora_ranks_bias": peft.LoraConfig(
        target_modules=["q_proj", "o_proj"], rank_pattern={"q_proj": 2}, use_rslora=True, bias="all", **LORA
    ),
    "head_saved": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **LORA),
    "embedding_saved": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm"], **LORA),
    "embedding": peft.LoraConfig(target_modules=["embed_tokens", "v_proj"], **LORA),
    "head": peft.LoraConfig(target_modules=["lm_head", "v_proj"], **LORA),
    "token_rows": peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6], **LORA),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
                          task_type="CAUSAL_LM", init_ia3_weights=False),
    "loha": peft.LoHaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_weights=False),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_weights=False),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_weights=False),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
}  # fmt: skip


def stir(model, seed=4):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def merged_weights(student):
    model = copy.deepcopy(student).merge_and_unload()
    return dict(model.named_parameters(remove_duplicate=False)), dict(model.named_parameters())


def assert_merged(student):
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    every, once = merged_weights(student)
    found = {}
    for name, tensor in full_weights(student):
        assert name not in found and not tensor.requires_grad
        found[name] = tensor.clone()
    assert found.keys() == once.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, every[name]), name
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_names_and_values_are_those_of_the_merged_model(kind, tied):
    torch.manual_seed(7)
    model = tiny_model(1, layers=2, tied=tied)
    assert_merged(stir(peft.get_peft_model(model, copy.deepcopy(ADAPTERS[kind]), adapter_name="pupil")))


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["lora", "dora", "embedding", "head_saved", "token_rows"])
def test_sharded_parameters_are_gathered(one_process, kind):
    torch.manual_seed(7)
    student = stir(peft.get_peft_model(tiny_model(1, tied=kind == "embedding"), copy.deepcopy(ADAPTERS[kind])))
    _, expected = merged_weights(student)
    for layer in student.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(student)
    found = {name: tensor.clone() for name, tensor in full_weights(student)}
    assert found.keys() == expected.keys() and not any(isinstance(tensor, DTensor) for tensor in found.values())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_only_active_adapters_count_and_none_where_they_are_off():
    torch.manual_seed(7)
    student = peft.get_peft_model(tiny_model(1), copy.deepcopy(ADAPTERS["lora"]), adapter_name="first")
    student.add_adapter("second", copy.deepcopy(ADAPTERS["head_saved"]))
    for active in ("first", "second"):
        student.set_adapter(active)
        assert_merged(stir(student))
    with student.disable_adapter():
        found = dict(full_weights(student))
    plain = dict(tiny_model(1).named_parameters())
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)


def test_names_that_look_like_adapters_are_only_names():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.default, self.lora_gate = nn.Linear(3, 3), nn.Linear(3, 3)

    def model():
        made = tiny_model(1)
        torch.manual_seed(0)
        made.model.modules_to_save = Named()
        return made

    assert [name for name, _ in full_weights(model())] == [name for name, _ in model().named_parameters()]
    config = peft.LoraConfig(target_modules=["default", "q_proj"], modules_to_save=["lora_gate"], **LORA)
    assert_merged(stir(peft.get_peft_model(model(), config)))


def test_adapters_injected_into_the_model_itself():
    torch.manual_seed(7)
    model = tiny_model(1)
    peft.inject_adapter_in_model(copy.deepcopy(ADAPTERS["lora"]), model)
    expected = peft.get_peft_model(tiny_model(1), copy.deepcopy(ADAPTERS["lora"]))
    with torch.no_grad():
        for left, right in zip(model.parameters(), expected.parameters(), strict=True):
            right.copy_(left)
    every, _ = merged_weights(expected)
    found = dict(full_weights(model))
    assert found.keys() == every.keys() and all(torch.equal(found[name], every[name]) for name in every)


def test_compiled_layers_and_other_architectures():
    model = Lfm2ForCausalLM(
        Lfm2Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                   num_key_value_heads=2, layer_types=["conv", "full_attention"])
    )  # fmt: skip
    expected = {name: tensor.clone() for name, tensor in model.named_parameters()}
    model.model.layers[0] = torch.compile(model.model.layers[0])
    found = dict(full_weights(torch.compile(model)))
    assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_cannot_be_merged_is_refused_by_name():
    activated = peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5, 6], **LORA)
    with pytest.raises(ValueError, match=r"adapter of model.layers.0.self_attn.q_proj \(peft.*cannot be merged: aLoRA"):
        list(full_weights(peft.get_peft_model(tiny_model(1), activated)))
    inputs = peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="the adapter ADAPTION_PROMPT cannot be merged"):
        list(full_weights(peft.get_peft_model(tiny_model(1), inputs)))
    model = tiny_model(1)
    model.model.norm.weight = nn.Parameter(torch.ones(32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="model.norm.weight is quantised"):
        list(full_weights(model))
