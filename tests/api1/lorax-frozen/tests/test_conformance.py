"""The kit, as somebody used it for plugin API 1."""

from __future__ import annotations

import pytest

from lorax_core.testing import (
    BadlyConditioned,
    Check,
    CheckFailed,
    CheckResult,
    CheckStatus,
    Measured,
    NotApplicable,
    Suite,
    conformance,
    run_checks,
)

test_gemma2 = conformance("gemma2")
test_opt = conformance("opt")
test_bert = conformance("bert")


def test_results_are_plain():
    seen = []

    results = run_checks("bert", checks=("declaration",), progress=seen.append)

    assert results == seen
    assert all(isinstance(result, CheckResult) and result.status is CheckStatus.PASSED for result in results)
    assert (results[0].key, results[0].ratio, results[0].to_json()["check"]) == ("declaration", None, "declaration")


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (Measured(1.0, 2.0, "small"), CheckStatus.PASSED),
        (Measured(3.0, 2.0), CheckStatus.FAILED),
        (NotApplicable("not here"), CheckStatus.SKIPPED),
        (BadlyConditioned("all is rounding"), CheckStatus.BADLY_CONDITIONED),
        (CheckFailed("wrong"), CheckStatus.FAILED),
    ],
)
def test_a_check_of_ones_own(outcome, status):
    def run(case):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with Suite("bert", device="cpu") as suite:
        assert suite.run("base", Check("own", "something", run)).status is status


def test_a_gated_block_is_made():
    from lorax_frozen.layers import OwnGatedMLP

    assert OwnGatedMLP().gate_up_proj.parts == (16, 16)
