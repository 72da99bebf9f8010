"""How Sphinx makes the site from these pages: `make docs`.

Decides the look, and what is a page. Knows nothing of the navigation: docs/index.md lists the pages, below headings that
become captions. Sources are those of the whole repository, so that a link between files leads to the same place on the site.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "core/pyproject.toml").read_text(encoding="utf-8"))["project"]
INDEX = "docs/index"

project = "lorax-core"
author = PROJECT["authors"][0]["name"]
version = release = PROJECT["version"]
copyright = author

extensions = ["myst_parser"]
root_doc = INDEX
include_patterns = ["*.md", "docs/*.md", "examples/README.md", "examples/tiny_qwen2/README.md"]
exclude_patterns = ["core", "tests", "plugins", "lorax_*", "dist", "build", ".*"]
myst_heading_anchors = 4
smartquotes = False  # what is shown is what the files say

html_theme = "furo"
html_title = f"{project} {version}"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False


def navigation(index: str) -> str:
    """The contents that the sidebar shows: for each heading of the index, the pages that its list names first."""
    parts = re.split(r"^## (.+)$", index, flags=re.MULTILINE)[1:]
    trees = []
    for caption, text in zip(parts[::2], parts[1::2], strict=True):
        pages = re.findall(r"^- \[(.+?)\]\((.+?)\.md\)", text, flags=re.MULTILINE)
        entries = [f"{title} <{page}>" for title, page in pages]
        trees.append("\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```"]))
    return "\n\n".join(trees)


def _add_navigation(_: Any, name: str, source: list[str]) -> None:
    if name == INDEX:
        source[0] += "\n" + navigation(source[0])


def _lead_to_the_index(app: Any, error: Exception | None) -> None:
    if error is None:
        page = '<!doctype html><meta charset="utf-8"><title>lorax-core</title>'
        page += f'<meta http-equiv="refresh" content="0; url={INDEX}.html"><a href="{INDEX}.html">Documentation</a>\n'
        (Path(app.outdir) / "index.html").write_text(page, encoding="utf-8")


def setup(app: Any) -> dict[str, Any]:
    """What Sphinx calls."""
    app.connect("source-read", _add_navigation)
    app.connect("build-finished", _lead_to_the_index)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
