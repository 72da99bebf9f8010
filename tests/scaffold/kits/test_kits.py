"""Packages as the command writes them pass the conformance kit, without an edit. `make test-scaffold` runs these."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from lorax_core.cli.main import app
from lorax_core.scaffold.check import check_package
from lorax_core.scaffold.package import make_package


@pytest.mark.parametrize("name", ["Starcoder2ForCausalLM", "ElectraModel"])
def test_a_package_passes_the_kit_as_it_was_written(name, tmp_path):
    arguments = [
        "plugins",
        "new",
        "lorax-made",
        "--from",
        f"transformers:{name}",
        "--into",
        tmp_path / "made",
        "--check",
    ]

    done = CliRunner().invoke(app, [*map(str, arguments)])

    assert done.exit_code == 0, done.stderr
    assert int(re.search(r"checked: (\d+) passed", done.stderr)[1]) > 200


def check_own_variants(package, folder):
    """The kit without what core computes alike for all: the sizes of heads that it adds, and types of rotary positions."""
    named = re.findall(r'^        "(\w+)": \{', package.files["src/lorax_made/cases.py"], re.MULTILINE)
    variants = ["base", *(one for one in named if not one.endswith("_rope"))]
    return check_package(package, folder, [word for one in variants for word in ("--variant", one)])


@pytest.mark.parametrize("name", ["Phi", "OPT"])
def test_a_package_passes_on_its_own_variants(name, tmp_path):
    package = make_package("lorax-made", f"transformers:{name}ForCausalLM")
    package.write(tmp_path / "made")

    report = check_own_variants(package, tmp_path / "made")

    assert report.ok, report.failures
    assert report.counts["passed"] > 100


def test_a_package_passes_and_with_a_mistake_says_where_to_look(tmp_path):
    package = make_package("lorax-made", "transformers:OlmoForCausalLM")
    package.write(tmp_path / "made")
    modeling = tmp_path / "made/src/lorax_made/modeling.py"

    report = check_own_variants(package, tmp_path / "made")
    modeling.write_text(modeling.read_text().replace("eps=1e-05", "eps=0.1"))
    broken = check_package(package, tmp_path / "made", ["--check", "numbers-hidden", "--variant", "base"])

    assert report.ok, report.failures
    assert not broken.ok
    assert [(key, look) for key, _, look in broken.failures] == [
        ("numbers-hidden[base]", "modeling.py: the options of the blocks, and `weight_map`")
    ]
