"""`docs/architectures.md` is what the declarations of this repository's packages say."""

from __future__ import annotations

import tomllib

import pytest

from lorax_core.cli.architectures import page
from lorax_core.errors import PluginError


def test_the_committed_page_is_the_one_that_is_made(repository):
    files = [*repository.glob("lorax_*/pyproject.toml"), *repository.glob("plugins/*/pyproject.toml")]
    packages = [tomllib.loads(file.read_text(encoding="utf-8"))["project"]["name"] for file in files]

    made = page(packages)

    committed = (repository / "docs/architectures.md").read_text(encoding="utf-8")
    assert made == committed, "the page is old; the command to make it again is in its first lines"


def test_the_page_is_about_the_named_packages_only():
    made = page(["lorax-bert"])

    assert "| [bert](#bert) | `lorax-bert` |   | • | • | • | bidirectional |" in made
    assert "## bert" in made
    assert "qwen2" not in made


def test_a_package_that_is_not_there_is_an_error():
    with pytest.raises(PluginError, match="lorax-bertt"):
        page(["lorax-bertt"])
