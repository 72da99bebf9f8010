"""What the `config.json` of a checkpoint of ModernBERT says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, Self

from pydantic import PositiveInt, model_validator

from lorax_core.modeling import ModelConfig, Rope, read_rope

LayerType = Literal["full_attention", "sliding_attention"]
# By kind of layer: the key that files of transformers 4 state the rotary base with, and its default.
_BASES: Final = {
    "full_attention": ("global_rope_theta", 160000.0),
    "sliding_attention": ("local_rope_theta", 10000.0),
}


class ModernBertConfig(ModelConfig):
    """The fields that inference needs; defaults are those of transformers."""

    pad_token_id: int | None = 50283
    intermediate_size: PositiveInt = 1152
    hidden_activation: str = "gelu"
    max_position_embeddings: PositiveInt = 8192
    norm_eps: float = 1e-05
    norm_bias: bool = False
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    local_attention: PositiveInt = 128
    layer_types: tuple[LayerType, ...]
    classifier_pooling: Literal["cls", "mean"] = "cls"
    classifier_bias: bool = False
    classifier_activation: str = "gelu"
    head_dim: PositiveInt | None = None
    rope: dict[LayerType, Rope]

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Fill in what transformers derives where a file leaves it out."""
        config = {"max_position_embeddings": 8192, **raw}
        if config.get("layer_types") is None and isinstance(layers := config.get("num_hidden_layers"), int):
            every = config.get("global_attn_every_n_layers", 3)
            config["layer_types"] = ["sliding_attention" if at % every else "full_attention" for at in range(layers)]
        # Half a window is another spelling of transformers, and wins.
        if config.get("sliding_window") is not None:
            config["local_attention"] = 2 * config["sliding_window"]
        stated = config.get("rope_parameters") or {}
        if unknown := sorted(set(stated) - set(_BASES)):
            raise ValueError(f"rope_parameters has {unknown[0]!r:.60}, and is by layer type: {', '.join(_BASES)}")
        kinds = [kind for kind in _BASES if kind in (config.get("layer_types") or ())]
        return {**config, "rope": {kind: _rope(kind, config, stated.get(kind) or {}) for kind in kinds}}

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.head_dim is not None and self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"head_dim {self.head_dim}: heads of ModernBERT are hidden_size {self.hidden_size} over "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types names {len(self.layer_types)} layers of {self.num_hidden_layers}")
        for rope in self.rope.values():
            if rope.partial != 1.0:
                raise ValueError(f"partial_rotary_factor {rope.partial}: ModernBERT turns whole heads")
        return self

    def window(self, layer: int) -> int | None:
        """Keys that a query of this layer sees on each side, itself included; None is all."""
        return self.local_attention // 2 + 1 if self.layer_types[layer] == "sliding_attention" else None

    @property
    def max_tokens(self) -> int:
        return self.max_position_embeddings


def _rope(kind: str, config: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary parameters of one kind of layer. A scaling of transformers 4 is of both kinds."""
    key, default = _BASES[kind]
    parameters = {"rope_theta": config.get(key, default), **stated, **(config.get("rope_scaling") or {})}
    if parameters["rope_theta"] is None:
        raise ValueError(f"{key} is null; it is a number, {default} by default")
    rope = read_rope({"max_position_embeddings": config["max_position_embeddings"], "rope_parameters": parameters})
    # Heads turn whole: transformers reads no fraction of them here, and fails on one with any other type.
    if rope["type"] == "default":
        rope["partial"] = 1.0
    return rope
