"""Gemma 2: a decoder of core's blocks, with every flag that it needs."""

from __future__ import annotations

from functools import partial
from typing import Unpack

from lorax_core.modeling import (
    AttentionOptions,
    Decoder,
    DecoderLayer,
    EmbeddingHead,
    GatedMLP,
    LanguageModelHead,
    LastTokenClassificationHead,
    Model,
    ModelConfig,
    RMSNorm,
    RotaryAttention,
    RotaryEmbedding,
    Task,
    TokenClassificationHead,
)
from lorax_core.weights import WeightMap
from lorax_frozen.config import Gemma2Config


class OwnAttention(RotaryAttention):
    """Core's, by a subclass that passes its options on."""

    def __init__(self, config: Gemma2Config, rotary: RotaryEmbedding, **options: Unpack[AttentionOptions]) -> None:
        sizes = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        super().__init__(*sizes, rotary=rotary, **options)


class Gemma2Backbone(Decoder):
    """A batch to hidden rows `[tokens, hidden]`."""

    def __init__(self, config: Gemma2Config) -> None:
        hidden = config.hidden_size
        norm = partial(RMSNorm, hidden, eps=config.rms_norm_eps, offset=1.0)
        attention = partial(
            OwnAttention,
            config,
            RotaryEmbedding(config.head_dim, config.rope),
            causal=True,
            bias=config.attention_bias,
            out_bias=config.attention_bias,
            scale=config.query_pre_attn_scalar**-0.5,
            soft_cap=config.attn_logit_softcapping,
            qk_norm=None,
            qk_norm_whole=False,
        )
        layers = [
            DecoderLayer(
                attention(window=config.window(layer)),
                GatedMLP(hidden, config.intermediate_size, config.hidden_activation, bias=False),
                norm,
                parallel=False,
                norms="around",
            )
            for layer in range(config.num_hidden_layers)
        ]
        super().__init__(config, layers, norm(), max_positions=None, position_offset=0, embed_scale=hidden**0.5)

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names as transformers saves them."""
        return WeightMap(
            prefixes=("model",),
            rename={"**.gamma": "**.weight"},
            fuse={
                "layers.*.self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
                "layers.*.mlp.gate_up_proj": ("gate_proj", "up_proj"),
            },
            transpose=(),
            interleave={},
            tie={"lm_head.weight": "embed_tokens.weight"} if config.tie_word_embeddings else {},
            ignore=("**.rotary_emb.inv_freq",),
        )


class CappedHead(LanguageModelHead):
    """Capped logits."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__(config, soft_cap=config.final_logit_softcapping)


class VectorHead(EmbeddingHead):
    """Core's."""


class ScoreTokenHead(TokenClassificationHead):
    """Another name of the layer."""

    layer = "score"


class ScoreHead(LastTokenClassificationHead):
    """Core's."""


class Gemma2ForCausalLM(Model):
    """With its head alone."""

    task = Task.GENERATE
