"""Metrics against values computed by hand, reports, plots."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from distillm_ext.demo.tiny import make_tokenizer
from distillm_ext.evaluation.metrics import EvaluationResult, divergence_metrics, evaluate_student, rouge_l
from distillm_ext.evaluation.plots import plot_training
from distillm_ext.evaluation.report import Report, table_rows, write_report
from distillm_ext.generation import SamplingParams


def make_model(seed: int, vocab_size: int = 48, kind: str = "llama"):
    common = dict(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    config = LlamaConfig(**common)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=vocab_size, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(20)  # spread the logits: else both models are uniform
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def rows():
    """Rows of different lengths; the third has two separate stretches of targets."""
    return Dataset.from_list(
        [
            {"input_ids": [5, 6, 7, 8, 1], "loss_mask": [0, 0, 1, 1, 1], "prompt_length": 2},
            {"input_ids": [9, 10, 1], "loss_mask": [0, 1, 1], "prompt_length": 1},
            {"input_ids": list(range(11, 21)), "loss_mask": [0, 1, 1, 0, 0, 0, 0, 1, 1, 1], "prompt_length": 7},
        ]
    )


def by_hand(student, teacher, rows):
    """One row at a time, in float64, from the definitions."""
    kl = ce = agree = count = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        q = student(ids).logits[0].double().log_softmax(-1)
        p = teacher(ids).logits[0].double().log_softmax(-1)
        for position, flag in enumerate(row["loss_mask"]):
            if flag:
                mine, his = q[position - 1], p[position - 1]
                kl += (his.exp() * (his - mine)).sum().item()
                ce -= mine[row["input_ids"][position]].item()
                agree += float(mine.argmax() == his.argmax())
                count += 1
    return kl / count, ce / count, agree / count, count


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_metrics_equal_the_definitions(rows, kind, batch_size):
    student, teacher = make_model(1, kind=kind).eval(), make_model(2, kind=kind).eval()
    with torch.no_grad():
        expected = by_hand(student, teacher, rows)
    got = divergence_metrics(student, rows, teacher=teacher, batch_size=batch_size)
    assert got == pytest.approx(expected, rel=1e-5)
    assert expected[0] > 0.1 and expected[3] == 10


def test_rows_need_tokens_and_targets_alone_and_may_be_empty(rows):
    """No prompt_length, and a row without tokens: its place tells nothing, so the longest row is the one looked at."""
    student, teacher = make_model(1), make_model(2)
    expected = divergence_metrics(student, rows, teacher=teacher)
    bare = Dataset.from_list([{"input_ids": [], "loss_mask": []}, *rows.remove_columns("prompt_length").to_list()])
    assert divergence_metrics(student, bare, teacher=teacher) == pytest.approx(expected, rel=1e-6)


def test_a_model_that_is_not_used_in_parts_computes_the_columns_of_targets(rows):
    """Here for a hook on its head, which expects logits of three dimensions."""
    seen = []
    student, teacher = make_model(1).eval(), make_model(2).eval()
    with torch.no_grad():
        expected = by_hand(student, teacher, rows)
    student.get_output_embeddings().register_forward_hook(lambda _, __, logits: seen.append(logits.shape))
    assert divergence_metrics(student, rows, teacher=teacher, batch_size=8) == pytest.approx(expected, rel=1e-5)
    # Targets at 1, 2, 3, 4, 7, 8, 9 of the rows are predicted one column before.
    assert all(len(shape) == 3 for shape in seen) and seen[-1] == (3, 7, 48)


def test_a_model_of_nan_is_not_said_to_be_rebuilt_wrongly(rows, caplog):
    student = make_model(1)
    with torch.no_grad():
        student.get_output_embeddings().weight.fill_(float("nan"))
    assert math.isnan(divergence_metrics(student, rows, teacher=None)[1]) and "rebuilt" not in caplog.text


def test_a_model_is_its_own_perfect_student(rows, tokenizer):
    model = make_model(3)
    result = evaluate_student(model, rows, tokenizer, teacher=model)
    assert result.kl == pytest.approx(0, abs=1e-6) and result.agreement == 1.0


def test_without_a_teacher_what_needs_one_is_missing(rows, tokenizer):
    result = evaluate_student(make_model(1), rows, tokenizer)
    assert math.isnan(result.kl) and math.isnan(result.agreement) and math.isnan(result.rouge_l)
    assert result.as_dict()["kl"] is None and result.as_dict()["cross_entropy"] > 0


def test_vocabularies_of_different_size_are_compared_over_the_shared_part(rows):
    student, teacher = make_model(1, 48), make_model(2, 64)
    kl, *_ = divergence_metrics(student, rows, teacher=teacher)
    with torch.no_grad():
        teacher.resize_token_embeddings(48)
    assert kl == pytest.approx(divergence_metrics(student, rows, teacher=teacher)[0], rel=1e-5)


def test_mode_of_the_model_is_restored(rows, tokenizer):
    for training in (True, False):
        model, teacher = make_model(1).train(training), make_model(2).eval()
        evaluate_student(model, rows, tokenizer, teacher=teacher, generate_rows=1, max_new_tokens=2)
        assert model.training is training and not teacher.training


def test_responses_depend_on_seed_and_row_alone(rows, tokenizer):
    model, draw = make_model(1), SamplingParams(temperature=1.0)

    def score(seed, batch_size):
        return evaluate_student(
            model, rows, tokenizer, generate_rows=3, max_new_tokens=12, sampling=draw, seed=seed, batch_size=batch_size
        ).rouge_l

    assert score(0, 3) == score(0, 1)


def test_progress_counts_every_row(rows, tokenizer):
    seen = []
    evaluate_student(
        make_model(1), rows, tokenizer, batch_size=2, generate_rows=3, max_new_tokens=2,
        progress=lambda *call: seen.append(call),
    )  # fmt: skip
    assert seen == [("token metrics", 2, 3), ("token metrics", 3, 3), ("responses", 2, 3), ("responses", 3, 3)]


def test_bad_input(rows, tokenizer):
    model = make_model(1)
    with pytest.raises(ValueError, match="batch_size: expected an int >= 1"):
        evaluate_student(model, rows, tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="at least one row"):
        evaluate_student(model, rows.select([]), tokenizer)
    silent = rows.map(lambda row: {"loss_mask": [0] * len(row["input_ids"])})
    with pytest.raises(ValueError, match="no response token"):
        evaluate_student(model, silent, tokenizer)


def test_rouge_l_values():
    # LCS of 2 tokens over 4 and 2: precision 1, recall 1/2, F 2/3. The stemmer makes "cats" and "cat" one.
    assert rouge_l(["the cats"], ["the cat sat down"]) == pytest.approx(200 / 3)
    assert rouge_l(["a b", "x"], ["a b", "y"]) == pytest.approx(50)
    assert rouge_l([""], ["word"]) == 0
    for texts, references in (([], []), (["a"], [])):
        with pytest.raises(ValueError, match="texts"):
            rouge_l(texts, references)


# ---- report and plot

RESULT = EvaluationResult(1.25, 2.5, 0.5, 30.25, 100, 10, 5)
HISTORY = [
    {"step": 0, "eval_loss": 3.0, "eval_divergence": 2.0},
    *(
        {"step": s, "loss": 1 / s, "loss_divergence": 0.8 / s, "loss_ce": 0.2 / s, "phi": 0.1, "batches_data": 1,
         "batches_fresh": 1, "batches_replay": s % 2, "tokens_per_second": 100.0, "time_student": 0.6,
         "time_generation": 0.3, "batch_source": "data"}
        for s in range(1, 9)
    ),
    {"step": 8, "eval_loss": 2.0, "eval_divergence": 1.0},
    {"step": 8, "train_runtime": 3.0, "train_loss": 0.4},
]  # fmt: skip


def test_report_shows_table_settings_notes_and_environment(tmp_path):
    report = Report(
        "A run", {"before": RESULT, "after": RESULT}, {"training": {"alpha": 0.1}}, ["A note."], "training.png",
        [("say ``` it", {"after": "yes"})],
    )  # fmt: skip
    text = write_report(report, tmp_path / "report.md").read_text()
    for part in ("# A run", "| after | 1.250 | 2.500 | 0.500 | 30.2 |", "alpha: 0.1", "A note.", "(training.png)",
                 "10 held-out rows, 100 response tokens", "| torch |", "````text"):  # fmt: skip
        assert part in text, part
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
    with pytest.raises(ValueError, match="at least one model"):
        write_report(Report("x", {}, {}), tmp_path / "empty.md")


def test_table_leaves_out_what_nobody_measured():
    bare = EvaluationResult(math.nan, 2.0, math.nan, math.nan, 1, 1, 0)
    assert table_rows({"a": bare}) == [["model", "cross-entropy ↓"], ["a", "2.000"]]
    assert table_rows({"a": bare, "b": RESULT})[1] == ["a", "–", "2.000", "–", "–"]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_is_written_whole(tmp_path, suffix):
    path = plot_training(HISTORY, tmp_path / f"training{suffix}", title="t", warmup_steps=2)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") if suffix == ".png" else b"</svg>" in content
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_plot_names_every_series_with_units(tmp_path):
    text = plot_training(HISTORY, tmp_path / "p.svg").read_text()
    for label in ("loss", "divergence", "cross-entropy", "KL to teacher", "data", "fresh", "replay", "φ", "student",
                  "optimizer step", "tokens/s (black line)", "(nats per token)"):  # fmt: skip
        assert f"<!-- {label} -->" in text, label


def test_plot_of_a_log_without_steps_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no training step"):
        plot_training(HISTORY[:1], tmp_path / "p.png")
