from __future__ import annotations

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
