r"""Formulas as MathML, which browsers draw by themselves; `pymdownx.arithmatex` finds ``\(x\)`` and ``\[x\]``."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
# Words that the formula does not mark as such: KL, and what has four letters or more (ab is a product).
_WORD = re.compile(r"(?<!\\mathrm\{)(?<![\\A-Za-z_])(?:KL|[a-z]{4,})(?![A-Za-z])")
_LETTERS = re.compile(r'(?:<mi mathvariant="normal">[^<]+</mi>)+')


def on_page_content(content: str, **_: Any) -> str:
    return _FORMULA.sub(lambda found: mathml(html.unescape(found[2]), block=found[1] == "div"), content)


def mathml(formula: str, *, block: bool) -> str:
    """A formula of LaTeX; words are one identifier, functions have a space around them as operators do."""
    formula = _WORD.sub(r"\\mathrm{\g<0>}", formula.strip())
    text = convert(formula, display="block" if block else "inline")
    text = _LETTERS.sub(lambda found: f"<mi>{re.sub('<[^>]+>', '', found[0])}</mi>", text)
    return re.sub(r"<mi>(log|tanh)</mi>", r'<mo lspace="0.17em" rspace="0.17em">\1</mo>', text)
