"""`docs/security.md` names the test that holds each promise, and each of them exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def promises(text: str) -> list[str]:
    """The rows of the table of promises."""
    table = text.partition("## Promises")[2].partition("\n## ")[0]
    return [line for line in table.splitlines() if line.startswith("| ")][2:]


def missing(named: list[tuple[str, str]]) -> list[str]:
    """Tests that are named and do not exist."""
    found = []
    for file, test in named:
        path = ROOT / file
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
        if test not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}:
            found.append(f"{file}::{test}")
    return found


def test_every_promise_names_a_test_that_exists():
    rows = promises((ROOT / "docs/security.md").read_text(encoding="utf-8"))

    assert len(rows) > 15
    assert [row for row in rows if not NAMED.search(row)] == []
    assert missing([found for row in rows for found in NAMED.findall(row)]) == []


def test_a_test_that_is_not_there_is_noticed():
    here = "tests/test_security.py"

    assert missing([(here, "test_nowhere"), ("tests/nowhere.py", "test_x"), (here, "promises")]) == [
        f"{here}::test_nowhere",
        "tests/nowhere.py::test_x",
    ]


def test_the_policy_is_found_from_the_page_and_back():
    assert "docs/security.md" in (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert "../SECURITY.md" in (ROOT / "docs/security.md").read_text(encoding="utf-8")
    assert "docs/security.md" in (ROOT / "README.md").read_text(encoding="utf-8")
