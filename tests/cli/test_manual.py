"""The lists of `docs/cli.md` are the help texts, of every subcommand that there is."""

from __future__ import annotations

import typer

from lorax_core.cli.main import SUBCOMMANDS, app
from lorax_core.cli.manual import leaves, with_commands


def test_the_lists_of_the_page_are_those_that_are_made(repository):
    page = (repository / "docs/cli.md").read_text(encoding="utf-8")

    assert with_commands(page) == page, "the lists are old; run: python -m lorax_core.cli.manual docs/cli.md"


def test_every_subcommand_has_its_place_and_hidden_ones_have_none():
    made = with_commands("<!-- commands -->\n<!-- end -->")

    words = [words for words, _ in leaves(typer.main.get_command(app))]
    assert {words.split()[0] for words in words} == set(SUBCOMMANDS)
    assert [one for one in words if f"### lorax {one}\n" not in made] == []
    assert "plugins probe" not in words


def test_flags_have_their_values_and_defaults():
    made = with_commands("<!-- commands -->\n<!-- end -->")

    assert "lorax adapters merge ADAPTER... --out DIR [OPTIONS]\n" in made
    assert "| `--out DIR` | required | Folder of the result. |\n" in made
    assert "| `--port N` | `8000` |" in made
    assert "| `--truncate error\\|start\\|end` | `error` |" in made
    assert "| `--json` |  |" in made
    assert made.count("| `--quantize int8\\|int4` |") == 1  # among the flags of all that load a model
