"""`docs/conformance.md` says what the kit does."""

from __future__ import annotations

import re

import pytest

from lorax_core.plugins.resolve import load_cases
from lorax_core.testing.checks import CHECKS
from lorax_core.testing.compare import TOLERANCES
from lorax_core.testing.inputs import LONGEST
from lorax_core.testing.suite import known_keys


@pytest.fixture(scope="module")
def contract(repository):
    return (repository / "docs/conformance.md").read_text(encoding="utf-8")


def test_the_table_is_the_list_of_checks(contract):
    rows = re.findall(r"^\| `([\w-]+)` \| (.*) \|$", contract, re.MULTILINE)

    assert rows == [(check.name, check.proves) for check in CHECKS]


def test_numbers_in_the_text_are_those_of_the_code(contract):
    float32, float16, bfloat16 = TOLERANCES.values()

    assert f"{LONGEST} at most" in contract
    assert f"**{float32:.0e}".replace("e-0", "e-") in contract
    assert f"{float16} (float16) or {bfloat16} (bfloat16)" in contract


def test_the_example_names_checks_that_there_are(contract, make_spec):
    example = contract.partition("known_failures={")[2].partition("}")[0]
    names = re.findall(r'^ +"([\w-]+)(?:\[\w+\])?":', example, re.MULTILINE)

    assert names
    assert set(names) <= known_keys(load_cases(make_spec("qwen2"), None))
