"""What the package promises of others: every requirement has a floor, and the code runs with what the floors lack."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest
import transformers.cache_utils
from gguf_world import write_gguf
from packaging.requirements import Requirement
from packaging.version import Version
from test_decode import GREEDY, assert_rows, make, prompts
from transformers import AutoTokenizer

from distillm_ext.generation import generate
from distillm_ext.generation.loop import cache
from distillm_ext.models.loading import load_tokenizer

REQUIREMENTS = [Requirement(text) for text in importlib.metadata.requires("distillm_ext") or []]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_requirement_has_a_floor(requirement):
    assert [part for part in requirement.specifier if part.operator in (">=", "==")], f"{requirement} has no floor"


def test_transformers_that_others_pin_are_allowed():
    """vLLM and Python 3.10 hold transformers back; machines without a network have what they have."""
    floors = {requirement.name: requirement.specifier for requirement in REQUIREMENTS}
    assert floors["transformers"].contains(Version("5.17"))


# transformers before 5.23 lacks the name when ours is imported. It comes back, since later releases use it themselves.
WITHOUT_EMPTY_LAYERS = """
import transformers.cache_utils
taken = vars(transformers.cache_utils).pop("DummyLayer", None)
import distillm_ext.training.trainer
transformers.cache_utils.DummyLayer = taken

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from distillm_ext.generation import SamplingParams, generate_responses
from distillm_ext.generation.loop import cache

config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
assert cache._EMPTY_LAYERS == () and cache.supports_rows(config)
torch.manual_seed(0)
model = LlamaForCausalLM(config).eval()
found = generate_responses(
    model, [[3, 4, 5], [6]], SamplingParams(temperature=0.0), max_new_tokens=4, eos_token_ids=[]
).token_ids
for prompt, tokens in zip([[3, 4, 5], [6]], found):
    text = torch.tensor([prompt + tokens])
    assert model(text).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == tokens, (prompt, tokens)
"""


def test_the_cache_does_without_a_name_for_empty_layers(monkeypatch):
    """transformers before 5.23: the module is executed anew, its decode loop runs with what it found."""
    monkeypatch.delattr(transformers.cache_utils, "DummyLayer", raising=False)
    spec = importlib.util.find_spec("distillm_ext.generation.loop.cache")
    older = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, older)  # where dataclasses look their module up
    spec.loader.exec_module(older)
    assert older._EMPTY_LAYERS == ()
    monkeypatch.undo()
    monkeypatch.setattr(cache, "_EMPTY_LAYERS", older._EMPTY_LAYERS)
    ids, mask = prompts([3, 1])
    found = generate(make("llama"), ids, mask, GREEDY, max_new_tokens=[4, 4], eos_token_ids=())
    assert cache.supports_rows(make("llama").config)
    assert_rows(found, make("llama"), ids, mask, [4, 4])


@pytest.mark.slow
def test_decode_loop_without_empty_layers(tmp_path):
    # Elsewhere than in the source folder: Python would take the package of that folder for the installed one.
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EMPTY_LAYERS], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_ends_of_a_gguf_tokenizer_are_those_of_the_file(tmp_path, monkeypatch):
    """transformers before 5.18 takes the first token of a text for the last one too."""
    write_gguf(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tiny.gguf")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<bos>", "<eos>")
    tokenizer.eos_token = "<bos>"
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    assert load_tokenizer(tmp_path / "tiny.gguf").eos_token == "<eos>"
