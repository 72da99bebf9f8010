"""What rounding does to a right model is no failure, and where it hides everything nothing is judged."""

from __future__ import annotations

import pytest

from lorax_core.testing import CheckStatus
from lorax_core.testing.compare import TOLERANCES


def test_a_right_model_that_loses_what_the_reference_loses_passes(run, twins):
    result = run(twins["gpt2"], "numbers-hidden[rough]")

    assert result.status is CheckStatus.PASSED
    assert result.error > min(TOLERANCES.values())


@pytest.mark.parametrize("key", ["numbers-hidden", "packing-together", "cache-decode", "adapter-peft"])
def test_what_cannot_be_told_from_rounding_is_not_judged(key, run, twins):
    result = run(twins["gpt2"], f"{key}[hopeless]")

    assert result.status is CheckStatus.BADLY_CONDITIONED
    assert "the reference itself loses" in result.detail
    assert "smaller initializer_range" in result.detail


@pytest.mark.parametrize("key", ["weights-missing", "weights-accounted"])
def test_what_is_no_number_is_judged_all_the_same(key, run, twins):
    assert run(twins["gpt2"], f"{key}[hopeless]").status is CheckStatus.PASSED


@pytest.mark.parametrize("key", ["numbers-hidden", "numbers-generate", "adapter-merged", "dtype-float16"])
def test_norms_of_one_and_a_weight_are_well_conditioned(key, run, twins):
    result = run(twins["gemma2"], key)

    assert result.status is CheckStatus.PASSED, result.detail
