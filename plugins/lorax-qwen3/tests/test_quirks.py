"""What is particular to Qwen3: what a `config.json` may not ask for."""

from __future__ import annotations

import pytest

import lorax_core as lorax
from lorax_qwen3.cases import QWEN3
from lorax_qwen3.config import Qwen3Config


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope.type.*'longrope'"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(changes, told):
    with pytest.raises(lorax.CheckpointError, match=told):
        Qwen3Config.parse({**QWEN3.tiny_config, "model_type": "qwen3", **changes})
