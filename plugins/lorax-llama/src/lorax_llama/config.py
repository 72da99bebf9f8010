"""What the `config.json` of a checkpoint of Llama or Mistral says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import PositiveInt, model_validator

from lorax_core.modeling import ModelConfig, Rope, read_rope


class LlamaConfig(ModelConfig):
    """The fields that inference needs; defaults are those of transformers."""

    own_head_dim: ClassVar[bool] = True

    intermediate_size: PositiveInt = 11008
    num_key_value_heads: PositiveInt
    hidden_act: str = "silu"
    max_position_embeddings: PositiveInt = 2048
    rms_norm_eps: float = 1e-06
    attention_bias: bool = False
    mlp_bias: bool = False
    head_dim: PositiveInt
    rope: Rope

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Fill in what transformers derives where a file leaves it out."""
        config = {"max_position_embeddings": 2048, **raw}
        heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
        if config.get("num_key_value_heads") is None:
            config["num_key_value_heads"] = heads
        if config.get("head_dim") is None and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
            config["head_dim"] = hidden // heads
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
            raise ValueError(f"partial_rotary_factor {self.rope.partial}: Llama turns whole heads")
        return self

    @property
    def window(self) -> int | None:
        """Keys that a query sees, itself included; None is all, as always in Llama."""
        return None

    @property
    def max_tokens(self) -> int:
        # `dynamic` ends at the length it was trained for: past it, cached keys would have other frequencies.
        return self.rope.max_tokens or self.max_position_embeddings


class MistralConfig(LlamaConfig):
    """Llama's fields with Mistral's defaults, a window in every layer, and no biases."""

    intermediate_size: PositiveInt = 14336
    sliding_window: PositiveInt | None = 4096

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """As Llama's, from other defaults. transformers reads no biases here, whatever a file says of them."""
        config = {"max_position_embeddings": 131072, "num_key_value_heads": 8, **raw}
        return super().normalise({**config, "attention_bias": False, "mlp_bias": False})

    @property
    def window(self) -> int | None:
        return self.sliding_window
