"""What a Qwen2 checkpoint's `config.json` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt, model_validator

from lorax_core.modeling import ModelConfig, Rope, read_rope

LayerType = Literal["full_attention", "sliding_attention"]


class Qwen2Config(ModelConfig):
    """The fields that inference needs; defaults are those of transformers."""

    own_head_dim: ClassVar[bool] = True

    num_key_value_heads: PositiveInt
    intermediate_size: PositiveInt
    head_dim: PositiveInt
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: PositiveInt = 32768
    rope: Rope
    use_sliding_window: bool = False
    sliding_window: int | None
    max_window_layers: int = 28
    layer_types: tuple[LayerType, ...]
    is_causal: bool = True

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Fill in what transformers derives: key heads, head size, which layers slide, rotary parameters in either spelling."""
        config = {"max_position_embeddings": 32768, **raw}
        heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
        if config.get("num_key_value_heads") is None:
            config["num_key_value_heads"] = heads
        if config.get("head_dim") is None and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
            config["head_dim"] = hidden // heads
        window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
        if config.get("layer_types") is None and isinstance(layers := config.get("num_hidden_layers"), int):
            # Without a window all layers see everything, whatever their number.
            first = layers if window is None else config.get("max_window_layers", 28)
            config["layer_types"] = ["full_attention" if at < first else "sliding_attention" for at in range(layers)]
        rope = read_rope(config)
        # Heads turn whole: transformers' Qwen2 reads no fraction here, and fails on one with any other type.
        if rope["type"] == "default":
            rope["partial"] = 1.0
        return {**config, "sliding_window": window, "rope": rope}

    @model_validator(mode="after")
    def _shapes_fit(self) -> Qwen2Config:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.rope.partial != 1.0:
            raise ValueError(f"partial_rotary_factor {self.rope.partial}: Qwen2 turns whole heads")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types names {len(self.layer_types)} layers of {self.num_hidden_layers}")
        return self

    def window(self, layer: int) -> int | None:
        """Keys that a query of this layer sees in either direction, itself included; None is all."""
        if self.sliding_window is None or self.layer_types[layer] != "sliding_attention":
            return None
        # transformers counts the query among `sliding_window` keys, but not where it attends in both directions.
        return self.sliding_window + (not self.is_causal)

    @property
    def generates(self) -> bool:
        return self.is_causal

    @property
    def max_tokens(self) -> int:
        return self.rope.max_tokens or self.max_position_embeddings
