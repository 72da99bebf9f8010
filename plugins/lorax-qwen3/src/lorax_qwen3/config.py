"""What the `config.json` of a checkpoint of Qwen3 says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import PositiveInt, model_validator

from lorax_core.modeling import ModelConfig, Rope, read_rope

LayerType = Literal["full_attention", "sliding_attention"]


class Qwen3Config(ModelConfig):
    """The fields that inference needs; defaults are those of transformers."""

    own_head_dim: ClassVar[bool] = True

    intermediate_size: PositiveInt = 22016
    num_key_value_heads: PositiveInt = 32
    head_dim: PositiveInt = 128
    hidden_act: str = "silu"
    max_position_embeddings: PositiveInt = 32768
    rms_norm_eps: float = 1e-06
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: PositiveInt | None
    max_window_layers: int = 28
    layer_types: tuple[LayerType, ...]
    rope: Rope

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Fill in what transformers derives where a file leaves it out."""
        config = {"max_position_embeddings": 32768, "num_key_value_heads": 32, **raw}
        heads = config.get("num_attention_heads")
        if config.get("num_key_value_heads") is None:
            config["num_key_value_heads"] = heads
        config["sliding_window"] = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
        if config.get("layer_types") is None and isinstance(layers := config.get("num_hidden_layers"), int):
            # Without a window all layers see everything, whatever their number.
            first = layers if config.get("sliding_window") is None else config.get("max_window_layers", 28)
            config["layer_types"] = ["full_attention" if at < first else "sliding_attention" for at in range(layers)]
        rope = read_rope(config)
        # Heads turn whole: transformers reads no fraction of them here, and fails on one with any other type.
        if rope["type"] == "default":
            rope["partial"] = 1.0
        return {**config, "rope": rope}

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.rope.partial != 1.0:
            raise ValueError(f"partial_rotary_factor {self.rope.partial}: Qwen3 turns whole heads")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types names {len(self.layer_types)} layers of {self.num_hidden_layers}")
        return self

    def window(self, layer: int) -> int | None:
        """Keys that a query of this layer sees, itself included; None is all."""
        if self.sliding_window is None or self.layer_types[layer] != "sliding_attention":
            return None
        return self.sliding_window

    @property
    def max_tokens(self) -> int:
        # `dynamic` ends at the length it was trained for: past it, cached keys would have other frequencies.
        return self.rope.max_tokens or self.max_position_embeddings
