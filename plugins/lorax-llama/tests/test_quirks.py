"""What is particular to Llama: what a `config.json` may not ask for."""

from __future__ import annotations

import pytest

import lorax_core as lorax
from lorax_llama.cases import LLAMA
from lorax_llama.config import LlamaConfig


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope.type.*'longrope'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(changes, told):
    with pytest.raises(lorax.CheckpointError, match=told):
        LlamaConfig.parse({**LLAMA.tiny_config, "model_type": "llama", **changes})
