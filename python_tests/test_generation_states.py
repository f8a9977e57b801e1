"""Models whose past is more than keys and values by position: a row of a batch gets what it gets alone."""

import peft
import pytest
import torch
import transformers
from test_decode import GREEDY, LLAMA, SMALL, VOCAB, assert_rows, prompts
from trainer_world import EOS, tiny_model
from transformers import GenerationConfig

from distillm_ext.generation import SamplingParams, generate
from distillm_ext.generation.loop.forward import CausalForward

STATES = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8)
LINEAR = dict(linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
# The kind of past: a state, convolutions, a window that begins anew, one in the modules, none; no way to say positions.
MODELS = {
    "mamba": ("Mamba", SMALL | dict(state_size=8)),
    "mamba2": ("Mamba2", SMALL | dict(num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8)),
    "bamba": ("Bamba", LLAMA | STATES | dict(attn_layer_indices=[1])),
    "qwen3_next": ("Qwen3Next", LLAMA | LINEAR | dict(
        num_hidden_layers=4, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, head_dim=16)),
    "recurrent_gemma": ("RecurrentGemma", LLAMA | dict(
        lru_width=32, attention_window_size=6, num_hidden_layers=3, head_dim=16)),
    "rwkv": ("Rwkv", SMALL | dict(attention_hidden_size=32)),
    "lfm2": ("Lfm2", LLAMA | dict(layer_types=["conv", "full_attention"], block_ff_dim=48)),
    "llama4": ("Llama4Text", LLAMA | dict(
        attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=48, head_dim=16)),
    "openai": ("OpenAIGPT", dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=32,
                                 initializer_range=0.3)),
    "bart": ("Bart", dict(vocab_size=VOCAB, d_model=32, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=48,
                          encoder_layers=2, max_position_embeddings=32, init_std=0.3, is_decoder=True,
                          add_cross_attention=False, pad_token_id=0, bos_token_id=1, eos_token_id=EOS)),
}  # fmt: skip


def make(name, seed=3):
    kind, settings = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_padded_batch_are_as_alone(name):
    model = make(name)
    assert not CausalForward(model).takes_rows
    lengths, limits = [2, 9, 1, 6, 6, 1, 9], [1, 6, 7, 3, 5, 6, 2]
    ids, mask = prompts(lengths)
    options = dict(max_new_tokens=limits, eos_token_ids=(EOS, 9, 30))
    params = SamplingParams(temperature=1.3, top_k=20, top_p=0.9)
    seeds = [5, -3, 2**62, 7, 8, 9, 10]
    found = generate(model, ids, mask, params, seeds, batch_size=2, **options)
    # Nothing of a call is left for the next one, whose prompts of one token look like a step that goes on.
    short = [2, 5]
    again = generate(model, ids[short], mask[short], GREEDY, max_new_tokens=4, eos_token_ids=())
    assert_rows(found, model, ids, mask, limits, params, seeds, ends=(EOS, 9, 30))
    assert_rows(again, model, ids[short], mask[short], [4, 4])


class Forgetful(transformers.LlamaForCausalLM):
    """Reads the whole text at every step."""

    def forward(self, input_ids, attention_mask=None, return_dict=None):
        return super().forward(input_ids, attention_mask=attention_mask, use_cache=False)


def test_a_model_without_any_cache_reads_the_whole_text():
    torch.manual_seed(3)
    model = Forgetful(transformers.LlamaConfig(**LLAMA)).eval()
    ids, mask = prompts([3, 7, 3])
    found = generate(model, ids, mask, GREEDY, max_new_tokens=5, eos_token_ids=())
    assert_rows(found, model, ids, mask, [5] * 3)


def test_parameters_ends_and_vocabulary_by_row():
    model = make("lfm2")
    ids, _ = prompts([4, 4, 4, 4])
    params = [GREEDY, SamplingParams(temperature=2.0), SamplingParams(top_k=1), SamplingParams(top_p=0.5)]
    ends = [(), (1, 2, 3), (9,), ()]
    options = dict(max_new_tokens=6, vocab_size=50)
    found = generate(model, ids, None, params, range(4), eos_token_ids=ends, **options)
    assert found.tokens.max() < 50
    for row in range(4):
        one = generate(model, ids[row : row + 1], None, params[row], [row], eos_token_ids=ends[row], **options)
        assert found.tokens[row, : found.lengths[row]].tolist() == one.tokens[0].tolist()
        assert bool(found.finished[row]) == bool(one.finished)


def test_a_row_without_a_distribution_spares_the_others():
    model = make("lfm2")
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("nan")
    ids, _ = prompts([5, 5, 5])
    ids[ids == 60] = 59
    ids[1, 2] = 60
    options = dict(max_new_tokens=5, eos_token_ids=(), vocab_size=60)
    found = generate(model, ids, None, GREEDY, **options)
    rest = generate(model, ids[[0, 2]], None, GREEDY, **options)
    assert int(found.lengths[1]) == 1 and not found.finished[1]
    assert torch.equal(found.tokens[[0, 2]], rest.tokens)


def test_the_model_is_left_as_it_was():
    model = make("lfm2").train()
    own = GenerationConfig(repetition_penalty=5.0, max_length=3, num_beams=2, do_sample=True, suppress_tokens=[9])
    ids, mask = prompts([3, 5])
    expected = generate(make("lfm2"), ids, mask, GREEDY, max_new_tokens=6, eos_token_ids=())
    model.generation_config, state = own, torch.get_rng_state()
    kind, attributes = type(model), set(vars(model))
    found = generate(model, ids, mask, GREEDY, max_new_tokens=6, eos_token_ids=())
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is own and model.training and type(model) is kind and set(vars(model)) == attributes


def test_a_wrapper_around_the_model_is_what_runs():
    """LoRA's own wrapper is called, whose forward a policy of its own may change."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "in_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make("lfm2"), config)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    ids, mask = prompts([3, 5])
    found = generate(model, ids, mask, GREEDY, max_new_tokens=4, eos_token_ids=())
    assert len(calls) == 8  # two lengths, four tokens each
    assert_rows(found, model, ids, mask, [4, 4])


def test_autocast_and_half_precision():
    ids, mask = prompts([3, 5])
    for context in (torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False)):
        with context:
            model = make("lfm2") if context._enabled else make("lfm2").bfloat16()
            found = generate(model, ids, mask, SamplingParams(), range(2), max_new_tokens=4, eos_token_ids=())
        assert found.logprobs.dtype == torch.float32 and found.lengths.tolist() == [4, 4]


# ---- positions


@pytest.mark.parametrize(
    ("kind", "settings", "limit"),
    [
        ("GPT2", dict(n_embd=32, n_layer=1, n_head=2, n_positions=12), 12),
        ("OPT", SMALL | dict(ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=12), 12),
        ("Llama", LLAMA | dict(max_position_embeddings=12), 12),
        ("Mpt", dict(d_model=32, n_heads=2, n_layers=1, max_seq_len=12), 12),
        ("Bart", MODELS["bart"][1] | dict(max_position_embeddings=12), 12),
        ("Bloom", dict(hidden_size=32, n_layer=1, n_head=2), None),
        ("Mamba", SMALL | dict(state_size=8), None),
    ],
)
def test_a_row_stops_where_the_positions_end(kind, settings, limit):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**({"vocab_size": VOCAB} | settings))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids, mask = prompts([11, 4, 9])
    found = generate(model, ids, mask, GREEDY, max_new_tokens=[5, 3, 6], eos_token_ids=())
    room = [11, 4, 9] if limit is None else [1, 3, 3]
    assert found.lengths.tolist() == ([5, 3, 6] if limit is None else room) and not found.finished.any()
    full, _ = prompts([12, 12])
    if limit is not None:
        with pytest.raises(ValueError, match=r"prompts\[0\]: its 12 tokens leave no room .*model's positions \(12\)"):
            generate(model, full, None, GREEDY, max_new_tokens=1, eos_token_ids=())


def test_a_model_that_only_transformers_could_run_needs_its_generate():
    inner = tiny_model(0)

    class Placeless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = inner, inner.config
            self.get_input_embeddings, self.get_output_embeddings = (
                inner.get_input_embeddings,
                inner.get_output_embeddings,
            )

        def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None):
            raise AssertionError("not reached")

    with pytest.raises(ValueError, match="takes no position_ids, so only transformers' own generate"):
        generate(Placeless(), torch.ones(1, 2, dtype=torch.long), None, GREEDY)
