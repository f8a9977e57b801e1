"""The decode loop through what wraps a model: LoRA, DDP, FSDP2, autocast, compile, checkpointing, other signatures."""

import json

import peft
import pytest
import torch
from generation_worker import CASES, WRAPPERS, world_prompts
from test_decode import GREEDY, assert_rows, make, prompts
from torch import nn

from distillm_ext.generation import SamplingParams, generate
from distillm_ext.generation.loop.forward import CausalForward

OPTIONS = dict(max_new_tokens=[6, 2, 5], eos_token_ids=())


def lora(model, **options):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


def test_lora_adapters_are_used():
    ids, mask = prompts([3, 8, 5])
    plain = generate(make("llama"), ids, mask, GREEDY, **OPTIONS)
    model = lora(make("llama"), lora_dropout=0.5).train()
    found = generate(model, ids, mask, GREEDY, **OPTIONS)
    assert not torch.equal(found.tokens, plain.tokens) and model.training
    assert_rows(found, model.eval(), ids, mask, OPTIONS["max_new_tokens"])


def test_virtual_tokens_are_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="virtual tokens"):
        generate(peft.get_peft_model(make("llama"), config), torch.ones(1, 2, dtype=torch.long), None, GREEDY)


def test_modes_come_back_and_checkpointing_does_not_disturb():
    ids, mask = prompts([3, 8, 5])
    model = make("llama")
    expected = generate(model, ids, mask, GREEDY, **OPTIONS)
    model.train()
    model.model.layers[0].eval()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    before = [module.training for module in model.modules()]
    assert torch.equal(generate(model, ids, mask, GREEDY, **OPTIONS).tokens, expected.tokens)
    assert [module.training for module in model.modules()] == before
    assert all("forward" not in vars(module) for module in model.modules() if isinstance(module, nn.Linear))
    model(ids, attention_mask=mask).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_an_error_restores_the_model():
    model = make("llama").train()
    with pytest.raises(RuntimeError, match="broken"):
        with CausalForward(model).ready():
            assert not model.training
            raise RuntimeError("broken")
    assert model.training and all("forward" not in vars(module) for module in model.modules())


def test_compiled_models_run_as_they_are():
    ids, mask = prompts([3, 8, 5])
    model = make("llama")
    expected = generate(model, ids, mask, GREEDY, **OPTIONS)
    assert torch.equal(generate(torch.compile(model), ids, mask, GREEDY, **OPTIONS).tokens, expected.tokens)


def test_autocast():
    ids, mask = prompts([3, 8, 5])
    model = make("llama")
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found = generate(model, ids, mask, SamplingParams(), range(3), **OPTIONS)
    handle.remove()
    assert set(seen) == {torch.bfloat16} and found.lengths.tolist() == [6, 2, 5]


def test_the_head_sees_one_position_per_row():
    for name in ("llama", "bloom"):
        model = make(name)
        seen = []
        handle = model.get_output_embeddings().register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(tuple(output.shape[:-1]))
        )
        ids, mask = prompts([6, 6, 6])
        generate(model, ids, mask, GREEDY, max_new_tokens=2, eos_token_ids=())
        handle.remove()
        assert seen == [(3, 1), (3, 1)]


def test_a_model_without_options_for_the_head_or_positions():
    class Plain(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.config = inner, inner.config

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def get_output_embeddings(self):
            return self.inner.get_output_embeddings()

        def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, return_dict=None):
            return self.inner(
                input_ids, attention_mask=attention_mask, past_key_values=past_key_values, use_cache=use_cache
            )

    inner = make("bloom")
    model = Plain(inner)
    seen = []
    inner.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    ids, mask = prompts([6, 2, 5])
    found = generate(model, ids, mask, GREEDY, **OPTIONS)
    assert set(seen) == {1} and not inner.lm_head._forward_pre_hooks
    assert_rows(found, inner, ids, mask, OPTIONS["max_new_tokens"])


def test_models_without_a_cache_are_refused():
    class Stateless(nn.Module):
        config = get_input_embeddings = None

        def get_output_embeddings(self):
            return None

        def forward(self, input_ids):
            return input_ids

    Stateless.get_input_embeddings = lambda self: nn.Embedding(4, 4)
    with pytest.raises(ValueError, match="takes neither cache nor past_key_values"):
        generate(Stateless(), torch.ones(1, 2, dtype=torch.long), None, GREEDY)


# ---- two processes


@pytest.fixture(scope="module")
def out(tmp_path_factory, forks):
    folder = tmp_path_factory.mktemp("generation")
    done = forks.run("generation_worker", folder, processes=2)
    # Judged by the last file, not by the exit status: gloo may abort after all work is done.
    assert all((folder / f"rank{rank}.json").is_file() for rank in (0, 1)), done.output[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_processes_generate_what_one_would(out, case, wrapper):
    for rank, report in enumerate(out):
        ids, mask, options = world_prompts(case, rank)
        expected = generate(make(WRAPPERS[wrapper]), ids, mask, SamplingParams(), range(len(ids)), **options)
        assert report[wrapper][case]["tokens"] == expected.tokens.tolist()


@pytest.mark.parametrize("case", CASES)
def test_sharded_processes_run_as_many_passes(out, case):
    hybrid = [report["fsdp2_hybrid"][case]["passes"] for report in out]
    assert hybrid[0] == hybrid[1] > 0
    passes = [report["fsdp2"][case]["passes"] for report in out]
    assert passes[0] == passes[1] > 0
    unsharded = [report["ddp"][case]["passes"] for report in out]
    assert max(unsharded) == passes[0] and (case == "even" or unsharded[0] != unsharded[1])
