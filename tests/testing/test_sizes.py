"""Every architecture is tested with heads of 32, 64, 80, 96 and 128."""

from __future__ import annotations

import pytest

from lorax_core.plugins import ArchitectureCases, Task
from lorax_core.plugins.cases import HEAD_SIZES
from lorax_core.testing import CheckStatus, Suite
from lorax_core.testing.sizes import with_head_sizes


def make_cases(tiny_config, **variants):
    return ArchitectureCases(
        tiny_config=tiny_config, variants=variants, references={Task.EMBED: "transformers:BertModel"}
    )


def added(cases, aliases=None):
    found = with_head_sizes(cases, aliases or {}).variants
    return {name: changes for name, changes in found.items() if name not in cases.variants}


def test_a_size_that_no_variant_has_is_added():
    cases = make_cases(
        {"hidden_size": 128, "num_attention_heads": 2}, narrow={"hidden_size": 64}, wide={"head_dim": 96}
    )

    assert added(cases) == {"heads_of_80": {"hidden_size": 160}, "heads_of_128": {"hidden_size": 256}}


def test_sizes_are_spelt_as_the_architecture_spells_them():
    cases = make_cases({"n_embd": 128, "n_head": 4})

    made = added(cases, {"n_embd": "hidden_size", "n_head": "num_attention_heads"})

    assert made["heads_of_80"] == {"n_embd": 320}
    assert "heads_of_32" not in made


def test_heads_with_a_size_of_their_own_get_it():
    cases = make_cases({"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64})

    assert added(cases)["heads_of_96"] == {"hidden_size": 192, "head_dim": 96}


def test_a_variant_of_the_author_wins():
    cases = make_cases({"hidden_size": 128, "num_attention_heads": 2}, heads_of_80={"hidden_size": 160, "eps": 1})

    assert with_head_sizes(cases, {}).variants["heads_of_80"] == {"hidden_size": 160, "eps": 1}


@pytest.mark.parametrize("tiny_config", [{}, {"hidden_size": 128}, {"num_attention_heads": 2}])
def test_nothing_is_added_to_a_config_that_does_not_say_how_wide_it_is(tiny_config):
    assert added(make_cases(tiny_config)) == {}


@pytest.mark.parametrize(
    "model_type",
    [
        "bert",
        "camembert",
        "distilbert",
        "gemma2",
        "gpt2",
        "gpt_neox",
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "roberta",
        "xlm-roberta",
    ],
)
def test_every_architecture_here_has_all_sizes(model_type, host):
    suite = Suite(model_type, host=host)
    found = set()
    for variant in suite.variants:
        config = suite.cases.config(variant)
        width = next(config[name] for name in ("hidden_size", "n_embd", "dim") if name in config)
        heads = next(config[name] for name in ("num_attention_heads", "n_head", "n_heads") if name in config)
        found.add(config.get("head_dim", width // heads))

    assert found >= set(HEAD_SIZES)


def test_a_default_that_fits_the_usual_heads_alone_is_found_on_the_first_size_that_is_added(make_spec, host):
    # The reference divides the width by the number of heads; those of the tiny model are of 64.
    with Suite(make_spec("qwen2", config="broken:HasHeadsOf64ByDefault"), host=host) as suite:
        planned = {variant: check for variant, check in suite.plan() if check.name == "config-defaults"}
        results = {variant: suite.run(variant, check).status for variant, check in planned.items()}

    assert results["base"] is CheckStatus.PASSED
    assert results["heads_of_32"] is CheckStatus.FAILED


def test_a_model_that_is_wrong_for_one_size_fails(make_spec, run):
    spec = make_spec("qwen2", backbone="broken:RoundsHeadsUp")

    assert run(spec, "numbers-hidden").status is CheckStatus.PASSED
    assert run(spec, "numbers-hidden[heads_of_80]").status is CheckStatus.FAILED
