"""What the package promises of others: every requirement has a floor, and the code runs with what the floors lack."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys

import pytest
from gguf_world import write_gguf
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import AutoTokenizer

from distillm_ext.training.models import load_tokenizer

REQUIREMENTS = [Requirement(text) for text in importlib.metadata.requires("distillm_ext") or []]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_requirement_has_a_floor(requirement):
    assert [part for part in requirement.specifier if part.operator in (">=", "==")], f"{requirement} has no floor"


def test_transformers_that_others_pin_are_allowed():
    """vLLM and Python 3.10 hold transformers back; machines without a network have what they have."""
    floors = {requirement.name: requirement.specifier for requirement in REQUIREMENTS}
    assert floors["transformers"].contains(Version("5.17"))


# transformers before 5.23. The name must be gone before anything of ours is imported.
WITHOUT_EMPTY_LAYERS = """
import transformers.cache_utils
vars(transformers.cache_utils).pop("DummyLayer", None)

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import distillm_ext.training.trainer
from distillm_ext.generation import SamplingParams, generate_responses
from distillm_ext.generation.cache import supports_rows

config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
assert supports_rows(config)
torch.manual_seed(0)
found = generate_responses(
    LlamaForCausalLM(config), [[3, 4, 5], [6]], SamplingParams(temperature=0.0), max_new_tokens=4, eos_token_ids=[]
)
print(found.token_ids)
"""


def test_decode_loop_without_empty_layers():
    before = WITHOUT_EMPTY_LAYERS.replace('vars(transformers.cache_utils).pop("DummyLayer", None)', "")
    without, with_them = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        for code in (WITHOUT_EMPTY_LAYERS, before)
    )
    assert without.returncode == 0, without.stderr
    assert re.search(r"\[\[\d+, \d+, \d+, \d+\]", without.stdout) and without.stdout == with_them.stdout


def test_ends_of_a_gguf_tokenizer_are_those_of_the_file(tmp_path, monkeypatch):
    """transformers before 5.18 takes the first token of a text for the last one too."""
    write_gguf(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tiny.gguf")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<bos>", "<eos>")
    tokenizer.eos_token = "<bos>"
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    assert load_tokenizer(tmp_path / "tiny.gguf").eos_token == "<eos>"
