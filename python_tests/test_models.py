"""Teachers, students and cuts: what is kept, what is independent, what survives a round trip."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from gguf_world import write_gguf
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
)

from distillm_ext.demo.tiny import make_tokenizer
from distillm_ext.models.loading import (
    ModelSpec,
    check_same_tokens,
    cut_student,
    load_student,
    load_teacher,
    load_tokenizer,
    middle_cut,
)

COMMON = dict(
    vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, eos_token_id=1, pad_token_id=0, bos_token_id=None,
)  # fmt: skip
CONFIGS = {
    "llama-tied": LlamaConfig(**COMMON, tie_word_embeddings=True),
    "llama-untied": LlamaConfig(**COMMON, tie_word_embeddings=False),
    "gemma2": Gemma2Config(**COMMON, head_dim=8, sliding_window=8),
    "qwen3": Qwen3Config(**COMMON, head_dim=8),
    "gpt2": GPT2Config(vocab_size=48, n_embd=32, n_layer=4, n_head=4, n_positions=64, eos_token_id=1),
    "opt": OPTConfig(
        vocab_size=48, hidden_size=32, ffn_dim=48, num_hidden_layers=4, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64,
    ),
    "neox": GPTNeoXConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
    ),
}  # fmt: skip


def make(name: str, dtype: torch.dtype = torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=dtype).eval()


@pytest.fixture
def tokens():
    return torch.randint(3, 48, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_cut_of_all_layers_is_the_teacher_and_shares_no_storage(name, tokens):
    teacher = make(name)
    student = cut_student(teacher, range(4)).eval()
    assert torch.equal(student(tokens).logits, teacher(tokens).logits)
    theirs = {p.data_ptr() for p in teacher.parameters()}
    assert not theirs & {p.data_ptr() for p in student.parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_of_a_cut_is_exact(name, dtype, tokens, tmp_path):
    student = cut_student(make(name, dtype), [0, 3, 1]).eval()
    assert student.dtype == dtype and student.config.num_hidden_layers == 3
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert torch.equal(loaded(tokens).logits, student(tokens).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_cache_of_a_cut_works(name, tokens):
    """Attention modules that kept the teacher's layer numbers would write beyond the student's cache."""
    student = cut_student(make(name), [0, 2, 3]).eval()
    options = dict(
        attention_mask=torch.ones_like(tokens), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
    )
    cached = student.generate(tokens, use_cache=True, **options)
    assert torch.equal(cached, student.generate(tokens, use_cache=False, **options))


def test_cut_takes_the_layers_in_the_order_given():
    teacher = make("llama-tied")
    student = cut_student(teacher, [3, 0])
    ours, theirs = student.model.layers, teacher.model.layers
    for mine, his in ((0, 3), (1, 0)):
        assert torch.equal(ours[mine].mlp.up_proj.weight, theirs[his].mlp.up_proj.weight)
        assert ours[mine].self_attn.layer_idx == mine


def test_cut_keeps_tied_embeddings_tied_and_layer_types_in_step():
    student = cut_student(make("llama-tied"), [0, 1])
    assert student.lm_head.weight is student.model.embed_tokens.weight
    teacher = make("gemma2")
    assert cut_student(teacher, [1, 2]).config.layer_types == [teacher.config.layer_types[i] for i in (1, 2)]
    assert len(teacher.config.layer_types) == 4


def test_cut_leaves_the_teacher_frozen_and_makes_a_trainable_student():
    teacher = make("llama-tied").requires_grad_(False)
    student = cut_student(teacher, [0])
    assert student.training and all(p.requires_grad for p in student.parameters())
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert teacher.config.num_hidden_layers == 4 and len(teacher.model.layers) == 4


@pytest.mark.parametrize(
    ("total", "keep", "expected"),
    [(30, 20, [*range(10), *range(20, 30)]), (4, 3, [0, 1, 3]), (4, 1, [0]), (4, 4, [0, 1, 2, 3])],
)
def test_middle_cut(total, keep, expected):
    assert middle_cut(total, keep) == expected


@pytest.mark.parametrize("keep", [0, 5, -1, 2.0, True, "2"])
def test_bad_keep_layers(keep):
    with pytest.raises(ValueError, match=r"keep_layers must be an integer in 1\.\.4"):
        load_student({"keep_layers": keep}, teacher=make("llama-tied"))


@pytest.mark.parametrize(
    ("layers", "message"),
    [([], "non-empty list"), ([0, 4], r"\[4\] out of range; the teacher has layers 0..3"), ([-1], "out of range"),
     ([0, 0], "at most once"), ([True], "list of layer indices"), ("01", "list of layer indices")],
)  # fmt: skip
def test_bad_layers(layers, message):
    with pytest.raises(ValueError, match=message):
        load_student({"layers": layers}, teacher=make("llama-tied"))


def test_bad_student_specifications():
    with pytest.raises(ValueError, match="give teacher="):
        load_student({"keep_layers": 2})
    with pytest.raises(ValueError, match="give one of layers, keep_layers, name"):
        load_student({"keep_layers": 2, "layers": [0]}, teacher=make("llama-tied"))


def test_architecture_without_a_layer_list_is_an_error():
    teacher = make("llama-tied")
    teacher.model.layers = torch.nn.Sequential(*teacher.model.layers)
    with pytest.raises(ValueError, match="expected one list of 4 decoder layers, found none; name a student"):
        cut_student(teacher, [0])


def test_layers_that_are_not_interchangeable_are_an_error():
    teacher = make("llama-tied")
    teacher.model.layers[2].mlp.up_proj = torch.nn.Linear(32, 40, bias=False)
    with pytest.raises(ValueError, match="layers are not interchangeable"):
        cut_student(teacher, [2])


# ---- loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(**{**COMMON, "vocab_size": len(make_tokenizer())})
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def test_teacher_is_frozen_and_in_eval_mode_in_its_dtype(folder):
    teacher = load_teacher(folder, "bfloat16")
    assert teacher.dtype == torch.bfloat16 and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert load_teacher({"name": str(folder)}).dtype == torch.float32


def test_student_is_trainable(folder):
    assert all(p.requires_grad for p in load_student(str(folder)).parameters())


@pytest.mark.parametrize("dtype", ["int8", "float99", torch.int64])
def test_bad_dtype(folder, dtype):
    with pytest.raises(ValueError, match="dtype must be"):
        load_teacher(folder, dtype)


def test_gguf_loads_dense_trainable_and_saveable(tmp_path, tokens):
    write_gguf(tmp_path)
    for spec in (tmp_path / "tiny.gguf", tmp_path, {"name": str(tmp_path), "gguf_file": "tiny.gguf"}):
        assert load_tokenizer(spec).eos_token == "<eos>"
        teacher = load_teacher(spec)
        assert all(p.dtype == torch.float32 for p in teacher.parameters())
        student = load_student({"keep_layers": 1}, teacher=teacher)
        student(tokens, labels=tokens).loss.backward()
        student.save_pretrained(tmp_path / "saved")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
        assert torch.equal(loaded(tokens).logits, student.eval()(tokens).logits)


def test_gguf_blocks_are_unpacked(tmp_path, monkeypatch):
    """Where a kernel for the blocks exists, they would stay packed: such a model neither trains nor saves."""
    seen = {}

    def spy(name, **options):
        seen.update(options, name=name)
        return make("llama-tied"), {}

    (tmp_path / "a.gguf").write_bytes(b"")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    load_teacher(tmp_path / "a.gguf")
    assert seen["name"] == str(tmp_path) and seen["gguf_file"] == "a.gguf"
    assert seen["quantization_config"].dequantize is True
    load_teacher(tmp_path / "a.gguf", "auto")
    assert seen["dtype"] == torch.float32


def test_missing_gguf_file_names_those_that_are_there(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"")
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no GGUF file at .*c\.gguf.*a\.gguf, b\.gguf"):
        ModelSpec.parse(tmp_path / "c.gguf")
    with pytest.raises(FileNotFoundError, match=r"no GGUF file 'c\.gguf'.*a\.gguf, b\.gguf"):
        ModelSpec.parse({"name": str(tmp_path), "gguf_file": "c.gguf"})
    with pytest.raises(ValueError, match=r"no config\.json; GGUF files.*a\.gguf, b\.gguf"):
        ModelSpec.parse(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model folder"):
        ModelSpec.parse("./nowhere/model")
    with pytest.raises(ValueError, match="a model is a string or"):
        ModelSpec.parse({"nam": "x"})


def test_tokenizer_without_padding_pads_with_eos(folder, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert load_tokenizer(tmp_path).pad_token == "<eos>"
    assert load_tokenizer(folder).pad_token == "<pad>"


def test_tokenizers_that_differ_are_an_error():
    ours, theirs = make_tokenizer(), make_tokenizer()
    check_same_tokens(ours, theirs)
    ours.add_tokens(["<more>"])
    check_same_tokens(ours, theirs)  # one vocabulary may be longer
    theirs.add_tokens(["<other>"])
    with pytest.raises(ValueError, match="'<more>' and '<other>'"):
        check_same_tokens(ours, theirs)
