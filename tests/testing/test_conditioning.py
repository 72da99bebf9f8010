"""What rounding does to a right model is no failure, and where it hides everything nothing is judged."""

from __future__ import annotations

import pytest
import torch

from lorax_core.testing import CheckStatus
from lorax_core.testing.checks import dtypes
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


def test_float16_that_overflows_in_the_reference_is_not_judged(run, twins):
    result = run(twins["gpt2"], "dtype-float16[wild]")

    assert result.status is CheckStatus.BADLY_CONDITIONED
    assert "the reference itself loses" in result.detail


@pytest.mark.parametrize("key", ["weights-missing", "weights-accounted"])
def test_what_is_no_number_is_judged_all_the_same(key, run, twins):
    assert run(twins["gpt2"], f"{key}[hopeless]").status is CheckStatus.PASSED


@pytest.mark.parametrize("key", ["numbers-hidden", "numbers-generate", "adapter-merged", "dtype-float16"])
def test_norms_of_one_and_a_weight_are_well_conditioned(key, run, twins):
    result = run(twins["gemma2"], key)

    assert result.status is CheckStatus.PASSED, result.detail


# --- 16 bit ---


@pytest.mark.parametrize("variant", ["base", "heads_of_80", "heads_of_96"])
@pytest.mark.parametrize("key", ["dtype-constants", "dtype-norms"])
def test_what_is_rounded_as_the_reference_rounds_it_passes(key, variant, run, twins):
    result = run(twins["gemma2"], f"{key}[{variant}]")

    assert result.status is CheckStatus.PASSED
    assert result.ratio < 0.8


@pytest.mark.parametrize("variant", ["base", "heads_of_80", "heads_of_96"])
def test_a_scale_that_is_not_rounded_to_the_dtype_is_found(variant, make_spec, run):
    wrong = make_spec("gemma2", backbone="broken:ScalesUnrounded")

    result = run(wrong, f"dtype-constants[{variant}]")

    assert result.status is CheckStatus.FAILED
    assert "embeddings are " in result.detail


@pytest.mark.parametrize(
    ("model_type", "broken"),
    [("gemma2", "NormalisesIn16Bit"), ("qwen2", "NormalisesIn16Bits"), ("bert", "NormalisesRoughly")],
)
def test_a_norm_in_16_bit_is_found(model_type, broken, make_spec, run, twins):
    right = run(twins[model_type], "dtype-norms")
    wrong = run(make_spec(model_type, backbone=f"broken:{broken}"), "dtype-norms")

    assert right.status is CheckStatus.PASSED
    assert right.ratio < 0.8
    assert wrong.status is CheckStatus.FAILED
    assert wrong.ratio > 100


@pytest.mark.parametrize("model_type", ["gemma2", "qwen2"])
def test_a_norm_in_bfloat16_is_found_without_float16(model_type, make_spec, run, monkeypatch):
    monkeypatch.setattr(dtypes, "DTYPES", (torch.bfloat16,))
    broken = {"gemma2": "NormalisesIn16Bit", "qwen2": "NormalisesIn16Bits"}[model_type]

    result = run(make_spec(model_type, backbone=f"broken:{broken}"), "dtype-norms")

    assert result.status is CheckStatus.FAILED
    assert result.ratio > 1.3


@pytest.mark.parametrize("broken", ["ScalesUnrounded", "NormalisesIn16Bit"])
def test_float32_does_not_show_what_16_bit_does(broken, make_spec, run):
    assert run(make_spec("gemma2", backbone=f"broken:{broken}"), "numbers-hidden").status is CheckStatus.PASSED
