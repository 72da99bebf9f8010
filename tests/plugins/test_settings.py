"""The environment as settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorax_core.errors import PluginError
from lorax_core.settings import Settings, canonical


def test_an_empty_environment_gives_the_defaults():
    assert Settings.from_env({}) == Settings(frozenset(), frozenset(), strict=False)
    assert Settings.from_env({"LORAX_PLUGINS": "", "LORAX_STRICT": ""}) == Settings()


def test_names_are_separated_by_commas_and_compared_in_canonical_form():
    environ = {"LORAX_PLUGINS": " Lorax_BERT, qwen2,,", "LORAX_BLOCK_PLUGINS": "gpt_neox"}

    settings = Settings.from_env(environ)

    assert settings.plugins == {"lorax-bert", "qwen2"}
    assert settings.block_plugins == {"gpt-neox"}
    assert canonical("gpt_neox") == canonical("GPT.Neox")


@pytest.mark.parametrize(("value", "strict"), [("1", True), ("Yes", True), ("0", False), ("off", False), (" ", False)])
def test_a_switch_is_on_or_off(value, strict):
    assert Settings.from_env({"LORAX_STRICT": value}).strict is strict


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"LORAX_CACHE": "/data/lorax", "XDG_CACHE_HOME": "/cache"}, "/data/lorax"),
        ({"LORAX_CACHE": " ~/lorax "}, "~/lorax"),
        ({"LORAX_CACHE": " ", "XDG_CACHE_HOME": "/cache"}, "/cache/lorax"),
        ({"XDG_CACHE_HOME": "relative"}, "~/.cache/lorax"),
        ({"XDG_CACHE_HOME": ""}, "~/.cache/lorax"),
        ({}, "~/.cache/lorax"),
    ],
)
def test_the_cache_is_ours_or_in_the_one_that_programs_share(environ, folder):
    assert Settings.from_env(environ).cache == Path(folder)


@pytest.mark.parametrize(
    ("environ", "message", "hint"),
    [
        ({"LORAX_PLUGINS": "bert qwen2"}, "LORAX_PLUGINS holds 'bert qwen2'", "separate names by commas"),
        ({"LORAX_BLOCK_PLUGINS": "a,-b"}, "LORAX_BLOCK_PLUGINS holds '-b'", "separate names by commas"),
        ({"LORAX_STRICT": "ture"}, "LORAX_STRICT is 'ture'", "did you mean 'true'?"),
        ({"LORAX_STRICT": "2"}, "LORAX_STRICT is '2'", "LORAX_STRICT=1 or LORAX_STRICT=0"),
    ],
)
def test_a_bad_value_is_quoted_with_the_way_out(environ, message, hint):
    with pytest.raises(PluginError) as caught:
        Settings.from_env(environ)

    assert message in caught.value.message
    assert hint in caught.value.hint
