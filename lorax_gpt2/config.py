"""What a GPT-2 checkpoint's `config.json` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import PositiveInt, field_validator

from lorax_core.modeling import ModelConfig


class GPT2Config(ModelConfig):
    """The fields that inference needs; defaults are those of transformers."""

    aliases: ClassVar[Mapping[str, str]] = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
    }

    max_position_embeddings: PositiveInt = 1024
    n_inner: PositiveInt | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    # `reorder_and_upcast_attn` is accepted and not read: see FlashGPT2Model.
    add_cross_attention: bool = False
    # transformers' default for GPT-2; files from before the key do not state it.
    tie_word_embeddings: bool = True

    @field_validator("add_cross_attention")
    @classmethod
    def _self_attention(cls, value: bool) -> bool:
        # Of an encoder-decoder: its second attention needs an encoder's rows, which no request brings.
        if value:
            raise ValueError("cross attention is not supported")
        return value

    @property
    def intermediate_size(self) -> int:
        """Width of the feed-forward layers."""
        return self.n_inner or 4 * self.hidden_size

    def scale(self, layer: int) -> float:
        """What the scores of this layer are multiplied with."""
        scale = (self.hidden_size // self.num_attention_heads) ** -0.5 if self.scale_attn_weights else 1.0
        # `layer` counts from 0, as transformers' layer_idx does. Stanford's Mistral runs of GPT-2 were trained so.
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @property
    def max_tokens(self) -> int:
        return self.max_position_embeddings
