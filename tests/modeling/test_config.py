from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest

from lorax_core.errors import CheckpointError
from lorax_core.modeling import ModelConfig

SOUND = {"model_type": "x", "hidden_size": 8, "vocab_size": 5, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_keys_that_inference_does_not_need_are_left_alone():
    config = ModelConfig.parse({**SOUND, "initializer_range": 0.02, "use_cache": True})

    assert config.hidden_size == 8


def test_every_field_that_is_missing_or_wrong_is_named_with_its_value():
    raw = {**SOUND, "hidden_size": "wide"}
    del raw["vocab_size"]

    with pytest.raises(CheckpointError) as caught:
        ModelConfig.parse(raw)

    assert "hidden_size" in caught.value.message
    assert "'wide'" in caught.value.message
    assert "vocab_size" in caught.value.message


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_size_below_one_is_refused(field, value):
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.parse({**SOUND, field: value})

    assert field in caught.value.message
    assert str(value) in caught.value.message


def test_a_configuration_does_not_change():
    config = ModelConfig.parse(SOUND)

    with pytest.raises(ValueError, match="frozen"):
        config.hidden_size = 9


class Renamed(ModelConfig):
    aliases: ClassVar[Mapping[str, str]] = {"n_embd": "hidden_size", "n_head": "num_attention_heads"}


class Wide(ModelConfig):
    own_head_dim: ClassVar[bool] = True


OWN = {"model_type": "x", "n_embd": 8, "n_head": 2, "vocab_size": 5, "num_hidden_layers": 1}


def test_an_architectures_own_keys_become_the_common_ones():
    config = Renamed.parse(OWN)

    assert (config.hidden_size, config.num_attention_heads) == (8, 2)


@pytest.mark.parametrize("stated", [None, 16])
def test_the_common_key_wins_where_a_file_states_both(stated):
    config = Renamed.parse({**OWN, "hidden_size": stated})

    assert config.hidden_size == (stated or 8)


@pytest.mark.parametrize(
    ("kind", "raw", "told"),
    [
        (Renamed, {**OWN, "n_head": 3}, "n_embd 8 is not a multiple of n_head 3"),
        (Renamed, {**SOUND, "num_attention_heads": 3}, "hidden_size 8 is not a multiple of num_attention_heads 3"),
        (Renamed, {**OWN, "num_attention_heads": 3}, "n_embd 8 is not a multiple of num_attention_heads 3"),
        (ModelConfig, {**SOUND, "num_attention_heads": 3}, "hidden_size 8 is not a multiple of num_attention_heads 3"),
        (Renamed, {**OWN, "n_embd": "wide"}, "n_embd: .*'wide'"),
        (Renamed, {key: value for key, value in OWN.items() if key != "n_head"}, "n_head: Field required"),
    ],
)
def test_errors_name_a_key_as_the_file_spells_it(kind, raw, told):
    with pytest.raises(CheckpointError, match=told):
        kind.parse(raw)


def test_heads_with_a_size_of_their_own_need_not_share_the_width():
    assert Wide.parse({**SOUND, "num_attention_heads": 3}).num_attention_heads == 3


def test_a_plugin_that_reads_what_the_file_lacks_is_named():
    class Eager(ModelConfig):
        @classmethod
        def normalise(cls, raw):
            return {**raw, "head_dim": raw["hidden_size"] // raw["num_attention_heads"]}

    with pytest.raises(CheckpointError, match=r"Eager\.normalise failed with KeyError: 'hidden_size'"):
        Eager.parse({"model_type": "eager"})
