"""Where a chat template's `{% generation %}` blocks begin and end in the text that it renders."""

from __future__ import annotations

import re

from distillm_ext.data.rows.checks import RowError

# With the line break behind, and the indent before, that templates drop beside a tag.
MARK = re.compile(r"(\{%-?\s*generation\s*(-?)%\})\n?")
_ENDMARK = re.compile(r"(?:^[ \t]*)?(\{%(-?)\s*endgeneration\s*-?%\})", re.MULTILINE)
# Noncharacters of Unicode, which no text holds: where marked text begins and ends.
BEGIN, END = "\ufdd0", "\ufdd1"


def with_marks(template: str) -> str:
    """A template that writes noncharacters where its `{% generation %}` blocks begin and end.

    The added expressions strip white space exactly where the tags beside them do.
    """
    template = MARK.sub(lambda found: f"{found[1]}{{{{ '{BEGIN}' {found[2]}}}}}", template)
    return _ENDMARK.sub(lambda found: f"{{{{{found[2]} '{END}' }}}}{found[1]}", template)


def marked_spans(marked: str, whole: str) -> list[tuple[int, int]]:
    """Character ranges of `whole` inside marks; `marked` is the same text from the template `with_marks`.

    Raises:
        RowError: the texts differ in more than the noncharacters.
    """
    spans, text, begin = [], 0, 0
    for piece in re.split(f"({BEGIN}|{END})", marked):
        if piece == BEGIN:
            begin = text
        elif piece == END:
            spans.append((begin, text))
        else:
            text += len(piece)
    if re.sub(f"[{BEGIN}{END}]", "", marked) != whole:
        raise RowError(
            "the chat template changes the text inside its {% generation %} marks, so that they cannot be found in it; "
            "use another template"
        )
    return spans
