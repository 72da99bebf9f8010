"""What a config.json leaves out, or spells as it was spelt before, is compared with the reference."""

from __future__ import annotations

import pytest

from lorax_core.plugins.resolve import load_cases
from lorax_core.testing import CheckStatus
from lorax_core.testing.case import Case
from lorax_core.testing.spelling import Spellings
from lorax_core.types import Task

DEFAULTS = [
    ("qwen2", "TiesByDefault", "base", "tie_word_embeddings is True where the reference has False"),
    ("qwen2", "HasAnotherBaseByDefault", "base", "rope.theta is 1000000.0 where the reference has 10000.0"),
    ("qwen2", "HasAnotherEpsilonByDefault", "base", "rms_norm_eps is 1e-05 where the reference has 1e-06"),
    ("qwen2", "ActsOtherwiseByDefault", "base", "hidden_act is 'gelu' where the reference has 'silu'"),
    ("qwen2", "PadsByDefault", "base", "pad_token_id is 0 where the reference has None"),
    ("qwen2", "SlidesInEveryLayerByDefault", "windows", "max_window_layers is 0 where the reference has 28"),
    ("gemma2", "HasSmallHeadsByDefault", "base", "head_dim is 64 where the reference has 256"),
    ("gemma2", "HasNoCapByDefault", "base", "final_logit_softcapping is None where the reference has 30.0"),
    ("gemma2", "SlidesInOddLayersByDefault", "base", "layer_types is ('full_attention', 'sliding_attention')"),
]
SPELLINGS = [
    ("qwen2", "KnowsNoBaseOutside", "other_base", "as the cases spell it is read otherwise"),
    ("qwen2", "KnowsNoTypeOfRope", "linear_rope", "as the cases spell it is read otherwise"),
    ("gpt2", "PrefersItsOwnNames", "base", "with n_embd=256 and hidden_size=128 is read otherwise"),
    ("gpt2", "KnowsItsOwnNamesOnly", "base", "in older spellings is refused, and the reference takes it"),
]


@pytest.mark.parametrize("key", ["config-defaults", "config-spellings"])
@pytest.mark.parametrize(
    ("model_type", "variant"),
    [("qwen2", "base"), ("qwen2", "windows"), ("qwen2", "linear_rope"), ("gemma2", "base"), ("bert", "base")],
)
def test_what_is_right_passes(model_type, variant, key, run, twins):
    result = run(twins[model_type], f"{key}[{variant}]")

    assert result.status is CheckStatus.PASSED, result.detail


@pytest.mark.parametrize(("model_type", "broken", "variant", "told"), DEFAULTS)
def test_a_wrong_default_is_found(model_type, broken, variant, told, make_spec, run):
    result = run(make_spec(model_type, config=f"broken:{broken}"), f"config-defaults[{variant}]")

    assert result.status is CheckStatus.FAILED
    assert told in result.detail
    assert "is read otherwise than the reference reads it" in result.detail


@pytest.mark.parametrize(("model_type", "broken", "_variant", "_told"), DEFAULTS[:3])
def test_files_that_state_every_key_do_not_show_a_wrong_default(model_type, broken, _variant, _told, make_spec, run):
    result = run(make_spec(model_type, config=f"broken:{broken}"), "numbers-hidden")

    assert result.status is CheckStatus.PASSED


@pytest.mark.parametrize(("model_type", "broken", "variant", "told"), SPELLINGS)
def test_an_old_spelling_that_is_not_read_is_found(model_type, broken, variant, told, make_spec, run):
    result = run(make_spec(model_type, config=f"broken:{broken}"), f"config-spellings[{variant}]")

    assert result.status is CheckStatus.FAILED
    assert told in result.detail


# --- spellings ---


@pytest.fixture
def spell(make_spec, host, tmp_path):
    """The spellings of a variant of an architecture as it is, for its default task."""

    def spell(model_type, variant, aliases=()):
        spec = make_spec(model_type)
        case = Case(spec, load_cases(spec, None), host, variant, tmp_path)
        config_class = type(case.reference(case.main).config)
        return Spellings(config_class, case.stated(case.main), dict(aliases))

    return spell


def test_the_shortest_file_has_no_defaults_and_nothing_that_is_derived(spell):
    spellings = spell("qwen2", "base")

    shortest = spellings.shortest()

    assert spellings.is_same(shortest)
    assert not {"rope_parameters", "layer_types", "rms_norm_eps", "hidden_act", "dtype"} & set(shortest)
    assert {"model_type", "architectures", "hidden_size", "num_key_value_heads"} <= set(shortest)


def test_old_files_have_a_base_outside_a_type_and_a_torch_dtype(spell):
    spellings = spell("qwen2", "linear_rope")

    old = spellings.old()

    assert spellings.is_same(old)
    assert "rope_parameters" not in old
    assert old["rope_theta"] == 10000.0
    assert old["rope_scaling"] == {"factor": 4.0, "type": "linear"}
    assert "torch_dtype" in old


def test_old_files_have_common_names_where_the_reference_takes_them(spell):
    old = spell("gpt2", "base").old()

    assert old["hidden_size"] == 128
    assert "n_embd" not in old


def test_a_spelling_that_the_reference_does_not_take_is_none(spell):
    spellings = spell("qwen2", "base")

    assert spellings.read({"hidden_size": "wide"}) is None
    assert not spellings.is_same({**spellings.full, "rms_norm_eps": 0.5})


def test_labels_are_counted_in_old_files(make_spec, host, tmp_path):
    spec = make_spec("bert")
    case = Case(spec, load_cases(spec, None), host, "base", tmp_path)
    config = case.reference(Task.TOKEN_CLASSIFICATION).config

    old = Spellings(type(config), case.stated(Task.TOKEN_CLASSIFICATION), {}).old()

    assert old["num_labels"] == 5
    assert "id2label" not in old
