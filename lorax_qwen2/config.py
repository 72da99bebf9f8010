"""What a Qwen2 checkpoint's `config.json` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from lorax_core.modeling import ModelConfig


class Qwen2Config(ModelConfig):
    """The fields that inference needs; defaults are those of transformers."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    head_dim: int
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    rope_theta: float = 10000.0
    rope_type: str = "default"
    use_sliding_window: bool = False

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Old checkpoints keep the rotary base beside `rope_scaling`; newer ones in `rope_parameters`."""
        config = dict(raw)
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        config["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
        if "rope_theta" in rope:
            config["rope_theta"] = rope["rope_theta"]
        heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
        if config.get("num_key_value_heads") is None:
            config["num_key_value_heads"] = heads
        if config.get("head_dim") is None and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
            config["head_dim"] = hidden // heads
        return config

    @model_validator(mode="after")
    def _served(self) -> Qwen2Config:
        if self.rope_type != "default":
            raise ValueError(f"rope_type {self.rope_type!r} is not served; served is 'default'")
        if self.use_sliding_window:
            raise ValueError("use_sliding_window is not served")
        return self

    @property
    def max_tokens(self) -> int:
        return self.max_position_embeddings
