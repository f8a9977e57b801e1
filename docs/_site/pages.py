"""Pages of the site that are no files of docs/: README, CONTRIBUTING and CHANGELOG, the notebook, settings, commands.

Links are written for the repository. On the site a link to a file of the repository goes to its page, or to a copy.
"""

from __future__ import annotations

import base64
import json
import os
import posixpath
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
NOTEBOOK, NOTEBOOK_PAGE = "examples/quickstart.ipynb", "quickstart.md"
COPIES = ("benchmarks/results/*.png", "examples/*.yaml", "LICENSE")
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
# Where a page of the site lies in the repository, and the other way round.
_IN_REPOSITORY = {page: text for text, page in TEXTS.items()} | {NOTEBOOK_PAGE: NOTEBOOK}
_ON_SITE = {text: page for page, text in _IN_REPOSITORY.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for text, page in TEXTS.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / text)))
    for path in (path for pattern in COPIES for path in sorted(ROOT.glob(pattern))):
        place = path.relative_to(ROOT).as_posix()
        _ON_SITE[place] = place
        files.append(File.generated(config, place, abs_src_path=str(path)))
    pages = {"api/settings.md": settings_page(), "api/commands.md": commands_page()}
    for place, content in (pages | notebook_pages(ROOT / NOTEBOOK)).items():
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    own = page.file.src_uri
    folder = posixpath.dirname(_IN_REPOSITORY.get(own, f"docs/{own}"))

    def on_site(link: re.Match[str]) -> str:
        path, *anchor = link[1].split("#")
        target = posixpath.normpath(posixpath.join(folder, path))
        if not (ROOT / target).exists():
            return link[0]  # a generated page or a picture of one; mkdocs looks for it
        place = _ON_SITE.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if place is None:
            raise PluginError(f"{own}: the link to {link[1]} is to nothing that the site has; add it to COPIES")
        return "#".join([posixpath.relpath(place, posixpath.dirname(own) or "."), *anchor])

    return _LINK.sub(on_site, markdown)


def settings_page() -> str:
    """The help of every field of `DistillationConfig` that transformers lacks, or gives another default."""
    from transformers import TrainingArguments

    from distillm_ext.training import DistillationConfig

    theirs = {field.name: field.default for field in fields(TrainingArguments)}
    ours = [field for field in fields(DistillationConfig) if field.name not in theirs]
    changed = [field for field in fields(DistillationConfig) if theirs.get(field.name, field.default) != field.default]
    rows = []
    for field in (*ours, *changed):
        text = str(field.metadata["help"]).replace("|", "\\|")
        rows.append(f"| `{field.name}` | `{str(field.type).replace('|', 'or')}` | `{field.default!r}` | {text} |")
    head = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    template = (ROOT / "docs/_site/settings.txt").read_text(encoding="utf-8")
    return template.replace("{fields}", "\n".join([*head, *rows]))


def commands_page() -> str:
    """What typer knows of the commands."""
    command = [sys.executable, "-m", "typer", "distillm_ext.cli.main", "utils", "docs", "--name", "distillm"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    if done.returncode:
        raise PluginError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    # The list of commands is cut off after some letters, and the sections that follow are their list.
    return re.sub(r"\*\*Commands\*\*:\n\n(?:\* .*\n)+", "", done.stdout)


def notebook_pages(path: Path) -> dict[str, str | bytes]:
    """A notebook as a page: its texts, its code, what the code printed, and its pictures."""
    parts, pictures = [], {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"quickstart-{len(pictures)}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![What the code above draws]({name})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                parts.append(f"```text\n{text.rstrip()}\n```")
    return {NOTEBOOK_PAGE: "\n\n".join(parts) + "\n", **pictures}
