"""vLLM as an engine: `pip install 'distillm_ext[vllm]'`, on a machine that vLLM supports.

Written against vLLM's public offline API (`LLM.generate`, `LLM.apply_model`, `LLM.reset_prefix_cache`). It has been
tested against a stand-in that records the calls; it has not been run with vLLM itself or on a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from distillm_ext.generation.arguments import check_rows, row_limits
from distillm_ext.generation.engines.engine import Engine
from distillm_ext.generation.generate import Responses
from distillm_ext.generation.sampling import SamplingParams

# Weights are handed over in parts of this size: a whole model twice would not fit beside its training state.
_PART_BYTES = 1 << 30
# vLLM reads the seed −1 as none.
_SEEDS = (1 << 63) - 1


def _load_part(model: Any, *, weights: list[tuple[str, Tensor]]) -> None:
    """Runs inside vLLM's worker, on its model."""
    model.load_weights(weights)


class VllmEngine(Engine):
    """Generates with a vLLM engine that holds a copy of the student.

    vLLM draws by its own sampler: texts are a function of the seeds, but not those of `LocalEngine`, and vLLM promises
    the same text again only for the same batch on the same version and hardware.

    In one process with vLLM's worker, weights are handed over without a copy between processes: set
    `VLLM_ENABLE_V1_MULTIPROCESSING=0`. With workers of their own vLLM must serialise them
    (`VLLM_ALLOW_INSECURE_SERIALIZATION=1`), which is slow. Quantised vLLM models cannot take weights this way.

    Args:
        model: name or folder of the model's checkpoint, whose tokenizer is not needed.
        options: passed to `vllm.LLM` (`dtype`, `gpu_memory_utilization`, `tensor_parallel_size`, `max_model_len`, ...).

    Raises:
        ImportError: vLLM is not installed.

    Example:
        >>> engine = VllmEngine("HuggingFaceTB/SmolLM2-135M", dtype="bfloat16", gpu_memory_utilization=0.3)
        >>> DistillationTrainer(..., generation_engine=engine).train()
    """

    def __init__(self, model: str, **options: Any) -> None:
        try:
            self._vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise ImportError("VllmEngine needs vLLM: pip install 'distillm_ext[vllm]'") from error
        # Raw log-probabilities: the student's own, before temperature and filters, as in `Responses`.
        settings = {"skip_tokenizer_init": True, "logprobs_mode": "raw_logprobs", **options}
        self.llm = self._vllm.LLM(model=model, **settings)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        max_new_tokens: int | Sequence[int],
        eos_token_ids: Sequence[int],
        seeds: Sequence[int] | None = None,
        vocab_size: int | None = None,
    ) -> Responses:
        """As `Engine.generate`."""
        check_rows([len(prompt) for prompt in prompts])
        limits = row_limits(max_new_tokens, len(prompts), None)
        if params.temperature > 0 and seeds is None:
            raise ValueError("seeds: sampling at temperature > 0 needs one seed per prompt, got None")
        if seeds is not None and len(seeds) != len(prompts):
            raise ValueError(f"seeds: expected one per prompt ({len(prompts)}), got {len(seeds)}")
        if not prompts:
            return Responses([], [], [])
        whole = vocab_size is None or vocab_size >= self.llm.llm_engine.model_config.get_vocab_size()
        shared = dict(
            temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p,
            stop_token_ids=list(eos_token_ids), ignore_eos=True, logprobs=0, detokenize=False,
            allowed_token_ids=None if whole else list(range(vocab_size or 0)),
        )  # fmt: skip
        requests = [
            self._vllm.SamplingParams(
                max_tokens=limit, seed=None if seeds is None else int(seeds[row]) & _SEEDS, **shared
            )
            for row, limit in enumerate(limits)
        ]
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = [found.outputs[0] for found in self.llm.generate(inputs, requests, use_tqdm=False)]
        return Responses(
            [list(output.token_ids) for output in outputs],
            [output.finish_reason == "stop" for output in outputs],
            [
                [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]
                for output in outputs
            ],
        )

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Loads weights into vLLM's model, a part at a time, and forgets cached prefixes of the former ones."""
        part: list[tuple[str, Tensor]] = []
        held = 0
        for name, tensor in weights:
            part.append((name, tensor))
            held += tensor.numel() * tensor.element_size()
            if held >= _PART_BYTES:
                self.llm.apply_model(partial(_load_part, weights=part))
                part, held = [], 0
        if part:
            self.llm.apply_model(partial(_load_part, weights=part))
        self.llm.reset_prefix_cache()
