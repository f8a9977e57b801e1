"""Responses from a causal language model: sampling parameters and the generation call.

Example:
    >>> from distillm_ext.generation import SamplingParams, generate_responses
    >>> responses = generate_responses(model, prompts, SamplingParams(temperature=0.7), max_new_tokens=64,
    ...                                eos_token_ids=(2,), seeds=range(len(prompts)))
"""

from distillm_ext.generation.generate import Responses, generate_responses
from distillm_ext.generation.sampling import SamplingParams, filter_logits, sample_inverse_cdf

__all__ = ["Responses", "SamplingParams", "filter_logits", "generate_responses", "sample_inverse_cdf"]
