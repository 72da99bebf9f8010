"""What is particular to DistilBert: what a `config.json` may not ask for."""

from __future__ import annotations

import pytest

import lorax_core as lorax
from lorax_distilbert.cases import DISTILBERT
from lorax_distilbert.config import DistilBertConfig


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"n_layers": 0}, "n_layers"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(changes, told):
    with pytest.raises(lorax.CheckpointError, match=told):
        DistilBertConfig.parse({**DISTILBERT.tiny_config, "model_type": "distilbert", **changes})
