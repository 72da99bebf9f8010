"""The site that `make docs` builds: every page has its place, links lead somewhere on GitHub too, no page loads from others."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = [ROOT / "examples/README.md", ROOT / "examples/tiny_qwen2/README.md"]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *EXAMPLES])
INDEX = (ROOT / "docs/index.md").read_text(encoding="utf-8")


def module(name: str):
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page: of its headings, in lower case, without marks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_headings_lead_to_one(page):
    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8"))

    wrong = [f"{file}#{name}" for file, name in links if name not in anchors(page.parent / file if file else page)]
    assert wrong == []


def test_every_page_is_in_the_navigation_once():
    listed = re.findall(r"^[^\n`]* <(.+)>$", module("conf").navigation(INDEX), flags=re.MULTILINE)

    assert sorted((ROOT / "docs" / f"{one}.md").resolve() for one in listed) == sorted(
        set(PAGES) - {ROOT / "docs/index.md"}
    )


def test_the_navigation_is_that_of_the_index():
    made = module("conf").navigation("# Top\n\n## Guides\n\n- [Serve](serving.md): see [this](other.md)\n\n## More\n")

    assert ":caption: Guides\n\nServe <serving>\n```" in made
    assert made.count("{toctree}") == 2
    assert "other" not in made


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ('<a href="b.html#there">x</a><img src="data:,"><a href="https://example.org">x</a>', None),
        ('<a href="c.html">x</a>', "a.html links to c.html: no such file"),
        ('<a href="b.html#nowhere">x</a>', "a.html links to b.html#nowhere: no such anchor"),
        ('<a href="#nowhere">x</a>', "a.html links to #nowhere: no such anchor"),
        ('<img src="x.png">', "a.html links to x.png: no such file"),
        ('<script src="https://cdn.example.org/x.js"></script>', "a.html loads https://cdn.example.org/x.js"),
        ('<link rel="stylesheet" href="//fonts.example.org/x">', "a.html loads //fonts.example.org/x"),
        ('<img srcset="https://example.org/x.png 2x">', "a.html loads https://example.org/x.png"),
    ],
)
def test_what_is_wrong_with_a_built_site_is_said(tmp_path, page, problem):
    (tmp_path / "a.html").write_text(page, encoding="utf-8")
    (tmp_path / "b.html").write_text('<p id="there">', encoding="utf-8")

    found = list(module("check_site").problems(tmp_path))

    assert found == ([problem] if problem else [])


def test_a_font_of_another_origin_is_seen_in_a_style_sheet(tmp_path):
    (tmp_path / "a.html").write_text("<p>", encoding="utf-8")
    (tmp_path / "a.css").write_text(
        "p { background: url(x.png) } @import 'https://fonts.example.org/x';", encoding="utf-8"
    )

    assert list(module("check_site").problems(tmp_path)) == ["a.css loads https://fonts.example.org/x"]
