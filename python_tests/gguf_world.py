"""A GGUF file written on the spot."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from tokenizers import pre_tokenizers


def write_gguf(folder: Path, name: str = "tiny.gguf") -> None:
    """A Llama model with a byte-level BPE tokenizer in GGUF's format."""
    writer = gguf.GGUFWriter(folder / name, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(256)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    # Two merges: transformers' older readers take a list of one for its entry.
    words = ["<eos>", "<bos>", "ab", "ba", *sorted(pre_tokenizers.ByteLevel.alphabet())[:252]]
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * 254)
    writer.add_token_merges(["a b", "b a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    draw = torch.Generator().manual_seed(0)

    def add(key, *shape):
        weight = torch.ones(*shape) if len(shape) == 1 else torch.randn(*shape, generator=draw) * 0.1
        data = weight.numpy()
        if len(shape) == 2 and "embd" not in key:
            blocks = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(key, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(key, data)

    add("token_embd.weight", 256, 32)
    add("output_norm.weight", 32)
    for layer in range(2):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{part}.weight", 32, 32)
        add(f"blk.{layer}.ffn_gate.weight", 64, 32)
        add(f"blk.{layer}.ffn_up.weight", 64, 32)
        add(f"blk.{layer}.ffn_down.weight", 32, 64)
        add(f"blk.{layer}.attn_norm.weight", 32)
        add(f"blk.{layer}.ffn_norm.weight", 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
