"""What the `config.json` of a checkpoint of DistilBert says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from lorax_core.modeling import PostNormConfig


class DistilBertConfig(PostNormConfig):
    """The fields that inference needs; defaults are those of transformers."""

    aliases: ClassVar[Mapping[str, str]] = {
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
    }
    own_keys: ClassVar[Mapping[str, str]] = {"hidden_dim": "intermediate_size", "activation": "hidden_act"}

    intermediate_size: PositiveInt = 3072
    type_vocab_size: Literal[0] = 0

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """What transformers has in its code, whatever a file states."""
        return {**raw, "layer_norm_eps": 1e-12, "type_vocab_size": 0}
