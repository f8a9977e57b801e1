"""Responses from a causal language model: sampling parameters, the decode loop, and engines that stand in for it.

Example:
    >>> from distillm_ext.generation import SamplingParams, generate_responses
    >>> responses = generate_responses(model, prompts, SamplingParams(temperature=0.7), max_new_tokens=64,
    ...                                eos_token_ids=(2,), seeds=range(len(prompts)))
"""

from distillm_ext.generation.engines.engine import Engine, LocalEngine
from distillm_ext.generation.engines.vllm import VllmEngine
from distillm_ext.generation.engines.weights import full_weights
from distillm_ext.generation.generate import GeneratedTokens, Responses, generate, generate_responses
from distillm_ext.generation.sampling import SamplingParams

__all__ = [
    "Engine",
    "GeneratedTokens",
    "LocalEngine",
    "Responses",
    "SamplingParams",
    "VllmEngine",
    "full_weights",
    "generate",
    "generate_responses",
]
