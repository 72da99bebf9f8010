"""What a GPT-NeoX checkpoint's `config.json` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import PositiveInt, model_validator

from lorax_core.modeling import ModelConfig, Rope, read_rope


class GPTNeoXConfig(ModelConfig):
    """The fields that inference needs; defaults are those of transformers."""

    num_attention_heads: PositiveInt
    intermediate_size: PositiveInt
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    max_position_embeddings: PositiveInt
    rope: Rope
    use_parallel_residual: bool = True
    attention_bias: bool = True

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Read the rotary parameters, in NeoX's old names (`rotary_pct`, `rotary_emb_base`) too; by default a quarter turns."""
        config = {"max_position_embeddings": 2048, **raw}
        old = {"partial_rotary_factor": raw.get("rotary_pct"), "rope_theta": raw.get("rotary_emb_base")}
        old = {name: value for name, value in old.items() if value is not None}
        return {**config, "rope": read_rope({**config, **old}, partial=0.25)}

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> GPTNeoXConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self

    @property
    def max_tokens(self) -> int:
        return self.rope.max_tokens or self.max_position_embeddings
