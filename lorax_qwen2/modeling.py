"""Qwen2: a decoder with rotary positions, grouped queries and a gated feed-forward block.

Decides what sets Qwen2 apart from core's decoder. Knows nothing of caches, files or adapters.
"""

from __future__ import annotations

from functools import partial

from lorax_core.modeling import (
    Decoder,
    DecoderLayer,
    GatedMLP,
    Model,
    ModelConfig,
    RMSNorm,
    RotaryAttention,
    RotaryEmbedding,
    Task,
    TokenClassificationHead,
)
from lorax_core.weights import WeightMap
from lorax_qwen2.config import Qwen2Config


class FlashQwen2Model(Decoder):
    """A batch to hidden rows `[tokens, hidden]`. Causal unless the checkpoint says otherwise; only q, k and v have a bias."""

    def __init__(self, config: Qwen2Config) -> None:
        hidden = config.hidden_size
        norm = partial(RMSNorm, hidden, config.rms_norm_eps)
        sizes = (hidden, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        attention = partial(RotaryAttention, *sizes, causal=config.is_causal, out_bias=False)
        rotary = RotaryEmbedding(config.head_dim, config.rope)
        layers = [
            DecoderLayer(
                attention(rotary=rotary, window=config.window(layer)),
                GatedMLP(hidden, config.intermediate_size, config.hidden_act),
                norm,
            )
            for layer in range(config.num_hidden_layers)
        ]
        super().__init__(config, layers, norm())

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names as Qwen2Model and its task models save them, with or without `model.`."""
        return WeightMap(
            prefixes=("model",),
            fuse={
                "layers.*.self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
                "layers.*.mlp.gate_up_proj": ("gate_proj", "up_proj"),
            },
            tie={"lm_head.weight": "embed_tokens.weight"} if config.tie_word_embeddings else {},
            # A model that attends in both directions generates nothing; its file may hold the head that it was trained from.
            ignore=() if config.generates else ("lm_head.weight",),
        )


class Qwen2TokenClassificationHead(TokenClassificationHead):
    """Labels of tokens. Qwen2 calls the layer as its sequence classifier's, which has no bias."""

    layer = "score"


class FlashQwen2ForCausalLM(Model):
    """Qwen2 that generates."""

    task = Task.GENERATE


class FlashQwen2ForEmbeddings(Model):
    """Qwen2 for embeddings."""

    task = Task.EMBED
