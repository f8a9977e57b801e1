"""`examples/quickstart.ipynb` runs from the first cell to the last, and its committed outputs are fit to show."""

from __future__ import annotations

import ast
import base64
import copy
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"


def outputs(notebook: nbformat.NotebookNode, kind: str) -> list[str]:
    """What the cells show: "text/plain" is what they print, "image/png" their pictures."""
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    if kind == "text/plain":
        return [output.text for output in shown if output.output_type == "stream"]
    return [output.data[kind] for output in shown if kind in output.get("data", {})]


@pytest.fixture(scope="module")
def committed() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_every_student_learns_from_its_teacher(committed):
    notebook = copy.deepcopy(committed)
    notebook.cells.append(nbformat.v4.new_code_cell("print(curves)"))
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    curves = ast.literal_eval(outputs(notebook, "text/plain")[-1])
    assert set(curves) == {"tokens alone", "forward_kl", "skew_kl", "generalized_js"}
    for name, curve in curves.items():
        assert [step for step, _ in curve] == [0, 20, 40, 60, 80]
        assert curve[-1][1] < 0.5 * curve[0][1], name
    tokens_alone = curves.pop("tokens alone")[-1][1]
    assert all(curve[-1][1] < 0.9 * tokens_alone for curve in curves.values())
    assert len(outputs(notebook, "image/png")) == 1


def test_the_committed_outputs_are_a_small_picture_and_text_without_paths(committed):
    nbformat.validate(committed)
    (picture,) = outputs(committed, "image/png")
    assert base64.b64decode(picture).startswith(b"\x89PNG") and len(picture) < 100_000
    assert NOTEBOOK.stat().st_size < 150_000
    texts = outputs(committed, "text/plain")
    assert any("forward_kl" in text for text in texts)
    assert not [text for text in texts if re.search(r"(^|[\s'\"])/\w+/|site-packages|Warning", text)]
