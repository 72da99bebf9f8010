"""The tables of `docs/serving.md` are those of the code."""

from __future__ import annotations

from serving_page import PAGE, with_tables


def test_the_tables_of_the_page_are_those_of_the_server(qwen2):
    page = PAGE.read_text(encoding="utf-8")

    assert with_tables(page, qwen2) == page, "the page is old; tests/support/serving_page.py says how to make it again"
