"""What a GPT-NeoX checkpoint's `config.json` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import PositiveInt, model_validator

from lorax_core.modeling import ModelConfig, Rope, read_rope


class GPTNeoXConfig(ModelConfig):
    """The fields that inference needs; defaults are those of transformers."""

    # The names of transformers 4; 5 writes the common ones, and reads them inside `rope_parameters` alone.
    own_keys: ClassVar[Mapping[str, str]] = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}

    intermediate_size: PositiveInt
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    max_position_embeddings: PositiveInt
    rope: Rope
    head_dim: int | None = None
    use_parallel_residual: bool = True
    attention_bias: bool = True

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Read the rotary parameters; by default a quarter of each head rotates."""
        # Before read_rope, which takes the length from it.
        config = {"max_position_embeddings": 2048, **raw}
        return {**config, "rope": read_rope(config, partial=0.25)}

    @model_validator(mode="after")
    def _heads_have_no_size_of_their_own(self) -> Self:
        # transformers turns heads by it, and attends with heads of the usual size.
        usual = self.hidden_size // self.num_attention_heads
        if self.head_dim and self.head_dim != usual:
            raise ValueError(
                f"head_dim {self.head_dim}: a head of GPT-NeoX is hidden_size / num_attention_heads, {usual}"
            )
        return self

    @property
    def max_tokens(self) -> int:
        # `dynamic` ends at the length it was trained for: past it, keys in the cache would have other frequencies.
        return self.rope.max_tokens or self.max_position_embeddings
