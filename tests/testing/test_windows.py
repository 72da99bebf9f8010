"""The check of windows says when there is none to see, and whose error it is when the reference fails."""

from __future__ import annotations

import pytest

from lorax_core.testing import CheckStatus
from lorax_core.types import Task


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ("full", "this variant has no window"),
        ("mixed", "a layer of this variant sees everything, so no row shows the edge of a window"),
    ],
)
def test_without_a_window_that_shows_nothing_is_proven(variant, reason, run, twins):
    result = run(twins["gemma2"], f"masking-window[{variant}]")

    assert result.status is CheckStatus.SKIPPED
    assert result.detail == reason


def test_a_window_that_shows_is_proven(run, twins):
    result = run(twins["gemma2"], "masking-window[sliding]")

    assert result.status is CheckStatus.PASSED
    assert result.detail == "windows of the model: [8]"


def test_a_forgotten_window_is_found(make_spec, run):
    result = run(make_spec("gemma2", config="broken:ForgetsWindows"), "masking-window[sliding]")

    assert result.status is CheckStatus.FAILED
    assert "attends to token 0, unlike the reference's" in result.detail


@pytest.mark.parametrize("check", ["masking-window[windows]", "numbers-hidden", "cache-decode", "dtype-float16"])
@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("RaisesItself", "tokens raises NotImplementedError: no windows today (at "),
        ("DoesNotLoad", "raises KeyError: 'a missing key' (at "),
    ],
)
def test_an_error_of_the_reference_is_said_to_be_its_own(reference, told, check, make_spec, run):
    spec = make_spec("qwen2", references={Task.GENERATE: f"broken:{reference}"})

    result = run(spec, check)

    assert result.status is CheckStatus.FAILED
    assert result.detail.startswith("the reference, not the plugin, fails: ")
    assert told in result.detail
