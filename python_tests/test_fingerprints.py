"""Fingerprints of models, tokenizers and data sets as users have them: saved, sharded, in another dtype, changed."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from distillm_ext.demo.tiny import make_tokenizer
from distillm_ext.teacher import (
    CacheMismatch,
    CacheSpec,
    CacheWriter,
    CompressionSettings,
    TeacherCache,
    fingerprint_dataset,
    fingerprint_model,
    fingerprint_tokenizer,
    finish_cache,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher whose weights bfloat16 can hold, saved in one file, in several, and in bfloat16."""
    out, tokenizer = tmp_path_factory.mktemp("models"), make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, eos_token_id=1, pad_token_id=0, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(out / "narrow")
    model.float().save_pretrained(out / "whole")
    model.save_pretrained(out / "sharded", max_shard_size="20KB")
    assert len(list((out / "sharded").glob("*.safetensors"))) > 2
    tokenizer.save_pretrained(out / "whole")
    return out


def load(path, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)


def test_the_same_weights_are_the_same_teacher(folder):
    expected = fingerprint_model(load(folder / "whole"))
    assert len(expected) == 64
    assert fingerprint_model(load(folder / "sharded")) == expected
    assert fingerprint_model(load(folder / "whole", attn_implementation="eager")) == expected
    for name in ("narrow", "whole"):
        for dtype in (torch.bfloat16, torch.float32):
            assert fingerprint_model(load(folder / name, dtype)) == expected
    fresh = LlamaForCausalLM(LlamaConfig.from_pretrained(folder / "whole"))
    fresh.config.architectures = None  # as in a model that was never saved
    fresh.load_state_dict(load(folder / "whole").state_dict())
    assert fingerprint_model(fresh) == expected


def test_one_changed_weight_or_setting_is_another_teacher(folder):
    expected = fingerprint_model(load(folder / "whole"))
    for name, parameter in load(folder / "whole").named_parameters():
        changed = load(folder / "whole")
        value = changed.get_parameter(name).data.view(-1)
        value[-1] = torch.nextafter(value[-1], torch.tensor(9.0))
        assert fingerprint_model(changed) != expected, name
        if parameter.dim() == 1:
            break
    changed = load(folder / "whole")
    changed.config.rms_norm_eps *= 2
    assert fingerprint_model(changed) != expected
    # float32 weights that bfloat16 rounds are others.
    changed = load(folder / "whole")
    changed.model.norm.weight.data += 2.0**-12
    assert fingerprint_model(changed) != fingerprint_model(changed.bfloat16())


def test_configurations_inside_of_a_configuration():
    class Outer(torch.nn.Module):
        class config:  # noqa: N801
            inner = {"dtype": "bfloat16", "width": 3}

            @classmethod
            def to_dict(cls):
                return {"text_config": dict(cls.inner)}

    expected = fingerprint_model(Outer())
    Outer.config.inner = {"dtype": "float32", "width": 3}
    assert fingerprint_model(Outer()) == expected
    Outer.config.inner = {"dtype": "float32", "width": 4}
    assert fingerprint_model(Outer()) != expected


def test_tokenizers(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder / "whole")
    expected = fingerprint_tokenizer(make_tokenizer())
    assert fingerprint_tokenizer(tokenizer) == expected
    tokenizer(["add 1 2", "copy"], padding=True, truncation=True, max_length=3)
    tokenizer.padding_side = "left"
    assert fingerprint_tokenizer(tokenizer) == expected
    tokenizer.save_pretrained(tmp_path)
    assert fingerprint_tokenizer(AutoTokenizer.from_pretrained(tmp_path)) == expected
    tokenizer.chat_template = "{{ messages }}"
    assert fingerprint_tokenizer(tokenizer) != expected
    other = make_tokenizer()
    other.add_tokens(["new"])
    assert fingerprint_tokenizer(other) != expected


def test_data_sets_in_any_order_but_not_of_other_rows():
    rows = [{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}, {"input_ids": [4], "loss_mask": [0]}]
    expected = fingerprint_dataset(rows)
    assert fingerprint_dataset(rows[::-1]) == expected
    for other in (rows[:1], [*rows, rows[0]], [rows[0], {"input_ids": [4], "loss_mask": [1]}]):
        assert fingerprint_dataset(other) != expected


def test_a_cache_says_which_of_them_differ(folder, tmp_path):
    teacher, tokenizer, rows = load(folder / "whole"), make_tokenizer(), [[1, 2, 3], [4, 5]]
    spec = CacheSpec(
        CompressionSettings(len(tokenizer), 4),
        teacher=fingerprint_model(teacher), tokenizer=fingerprint_tokenizer(tokenizer),
        dataset=fingerprint_dataset(rows), details={"dtype": "bfloat16"},
    )  # fmt: skip
    CacheWriter(tmp_path, spec).close()
    finish_cache(tmp_path, spec)
    same = dict(teacher=load(folder / "narrow", torch.bfloat16), tokenizer=tokenizer, dataset=rows[::-1])
    TeacherCache.open(tmp_path, **same)
    changed = load(folder / "whole")
    changed.lm_head.weight.data[3, 3] += 1e-3
    other = make_tokenizer()
    other.add_tokens(["new"])
    for given, words in (
        (dict(teacher=changed), r"another teacher \(cache \w{12}… in bfloat16, here \w{12}…\);"),
        (dict(tokenizer=other), r"another tokenizer \(cache [^)]*\);"),
        (dict(dataset=rows[:1]), r"another dataset \(cache [^)]*\);"),
        (dict(teacher=changed, dataset=rows[:1]), r"another teacher \([^)]*\) and another dataset"),
    ):
        with pytest.raises(CacheMismatch, match=words):
            TeacherCache.open(tmp_path, **(same | given))
