"""What the site makes of docstrings and formulas; that its pages hold together is for `mkdocs build --strict`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("griffe")
pytest.importorskip("latex2mathml")
HOOKS = Path(__file__).parent.parent / "docs" / "_site"


def hook(name: str):
    spec = importlib.util.spec_from_file_location(name, HOOKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docstrings, maths = hook("docstrings"), hook("maths")


def test_formulas_in_a_line_and_in_a_block():
    text = "With :math:`p =\nq` and\n\n    .. math:: a = b,\n              c = d\n\nend"
    assert docstrings.mathematics(text) == "With \\(p = q\\) and\n\n    \\[\n    a = b, c = d\n    \\]\n\nend"


def test_a_table_without_a_head_joins_lines_and_names_bars():
    table = "  ====  ========\n  a     \\(|x| \\|y\\)\n        goes on\n  b     two\n  ====  ========\n\nend"
    rows = ["  |  |  |", "  | --- | --- |", r"  | a | \(\vert x\vert  \Vert y\) goes on |", "  | b | two |", "", "end"]
    assert docstrings.tables(table).splitlines() == rows


def test_a_table_with_a_head():
    assert docstrings.tables("==  ==\nk   v\n==  ==\na   b\n==  ==").splitlines() == [
        "| k | v |",
        "| --- | --- |",
        "| a | b |",
    ]


def test_sections_have_griffes_names_and_a_line_for_each_parameter():
    text = "Args:\n    a, b,\n        c: both:\n        long.\n    d: x, y: z\n\nRaises:\n    A, B: bad\n\n"
    text += "Example:\n    >>> f"
    assert docstrings.sections(text).splitlines() == [
        "Args:", "    a: both:", "        long.", "    b: both:", "        long.", "    c: both:", "        long.",
        "    d: x, y: z", "", "Raises:", "    A | B: bad", "", "Examples:", "    >>> f",
    ]  # fmt: skip


def test_public_names_become_links():
    homes = {"f": "distillm_ext", "g": "distillm_ext.training"}
    text = "`f` and `g`, ``g`` and `h`\n>>> `g`"
    assert docstrings.linked(text, homes, own="f") == "`f` and [`g`][distillm_ext.training.g], ``g`` and `h`\n>>> `g`"


def test_formulas_become_mathml_with_words_and_functions():
    page = '<p><span class="arithmatex">\\(KL(p) &lt; \\log z^{teacher}\\)</span></p>'
    found = maths.on_page_content(page)
    assert "arithmatex" not in found and found.startswith("<p><math") and 'display="inline"' in found
    assert "<mi>KL</mi>" in found and "<mi>teacher</mi>" in found and ">log</mo>" in found and "&#x0003C;" in found
    block = maths.on_page_content('<div class="arithmatex">\\[x\\]</div>')
    assert 'display="block"' in block
