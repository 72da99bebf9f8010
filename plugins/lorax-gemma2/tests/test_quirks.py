"""What is particular to Gemma2: what a `config.json` may not ask for."""

from __future__ import annotations

import pytest

import lorax_core as lorax
from lorax_gemma2.cases import GEMMA2
from lorax_gemma2.config import Gemma2Config


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"use_bidirectional_attention": 3}, "use_bidirectional_attention"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope.type.*'longrope'"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(changes, told):
    with pytest.raises(lorax.CheckpointError, match=told):
        Gemma2Config.parse({**GEMMA2.tiny_config, "model_type": "gemma2", **changes})
