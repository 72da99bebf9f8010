"""What each `config.json` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import PositiveInt, model_validator

from lorax_core.modeling import ModelConfig, PostNormConfig, Rope, read_rope


class Gemma2Config(ModelConfig):
    """Defaults are those of transformers."""

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
    layer_types: tuple[str, ...]
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0
    rope: Rope

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        config = {"max_position_embeddings": 8192, **raw}
        if config.get("layer_types") is None and isinstance(layers := config.get("num_hidden_layers"), int):
            config["layer_types"] = ["full_attention" if at % 2 else "sliding_attention" for at in range(layers)]
        rope = read_rope(config, theta=10000.0, partial=1.0)
        if rope["type"] == "default":
            rope["partial"] = 1.0
        return {**config, "rope": rope}

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.rope.partial != 1.0:
            raise ValueError(f"partial_rotary_factor {self.rope.partial}: Gemma 2 turns whole heads")
        return self

    def window(self, layer: int) -> int | None:
        """Keys that a query of this layer sees; None is all."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    @property
    def max_tokens(self) -> int:
        return self.rope.max_tokens or self.max_position_embeddings


class OptConfig(ModelConfig):
    """Defaults are those of transformers; what is not computed is refused."""

    pad_token_id: int | None = 1
    ffn_dim: PositiveInt = 3072
    max_position_embeddings: PositiveInt = 2048
    do_layer_norm_before: bool = True
    word_embed_proj_dim: PositiveInt | None = None
    activation_function: str = "relu"
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True

    @classmethod
    def normalise(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        return raw if raw.get("word_embed_proj_dim") else {**raw, "word_embed_proj_dim": raw.get("hidden_size")}

    @model_validator(mode="after")
    def _nothing_else_is_asked_for(self) -> Self:
        if not self.do_layer_norm_before or self.word_embed_proj_dim != self.hidden_size:
            raise ValueError("do_layer_norm_before and word_embed_proj_dim are supported at their defaults alone")
        return self

    @property
    def max_tokens(self) -> int:
        return self.max_position_embeddings


class BertConfig(PostNormConfig):
    """The fields of core's encoder."""
