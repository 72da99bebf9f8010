"""What the `config.json` of a checkpoint of Gemma2 says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import PositiveInt, model_validator

from lorax_core.modeling import ModelConfig, Rope, read_rope

LayerType = Literal["full_attention", "sliding_attention"]


class Gemma2Config(ModelConfig):
    """The fields that inference needs; defaults are those of transformers."""

    own_head_dim: ClassVar[bool] = True

    pad_token_id: int | None = 0
    intermediate_size: PositiveInt = 9216
    num_key_value_heads: PositiveInt = 4
    head_dim: PositiveInt = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: PositiveInt = 8192
    rms_norm_eps: float = 1e-06
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    query_pre_attn_scalar: float = 256
    sliding_window: PositiveInt | None = 4096
    layer_types: tuple[LayerType, ...]
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0
    use_bidirectional_attention: bool | None = None
    rope: Rope

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Fill in what transformers derives where a file leaves it out."""
        config = {"max_position_embeddings": 8192, **raw}
        if config.get("layer_types") is None and isinstance(layers := config.get("num_hidden_layers"), int):
            config["layer_types"] = ["full_attention" if at % 2 else "sliding_attention" for at in range(layers)]
        rope = read_rope(config)
        # Heads turn whole: transformers reads no fraction of them here, and fails on one with any other type.
        if rope["type"] == "default":
            rope["partial"] = 1.0
        return {**config, "rope": rope}

    @model_validator(mode="after")
    def _nothing_else_is_asked_for(self) -> Self:
        # Other values change what transformers computes in a way that no block of core does.
        if self.use_bidirectional_attention not in (None, False):
            raise ValueError(
                f"use_bidirectional_attention {self.use_bidirectional_attention!r} is not supported; supported is None "
                "or False"
            )
        return self

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.rope.partial != 1.0:
            raise ValueError(f"partial_rotary_factor {self.rope.partial}: Gemma2 turns whole heads")
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
