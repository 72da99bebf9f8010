"""Gemma2: a decoder with rotary positions, grouped queries, norms around both blocks and a gated feed-forward block.

Decides what sets Gemma2 apart from core's decoder. Knows nothing of caches, files or adapters.
"""

from __future__ import annotations

from functools import partial

from lorax_core.modeling import (
    Decoder,
    DecoderLayer,
    GatedMLP,
    LanguageModelHead,
    Model,
    ModelConfig,
    RMSNorm,
    RotaryAttention,
    RotaryEmbedding,
    Task,
    TokenClassificationHead,
)
from lorax_core.weights import WeightMap
from lorax_gemma2.config import Gemma2Config


class Gemma2Backbone(Decoder):
    """A batch to hidden rows `[tokens, hidden]`."""

    def __init__(self, config: Gemma2Config) -> None:
        hidden = config.hidden_size
        norm = partial(RMSNorm, hidden, eps=config.rms_norm_eps, offset=1.0)
        # All layers rotate the same way, so one set of frequencies is enough.
        rotary = RotaryEmbedding(config.head_dim, config.rope)
        attention = partial(
            RotaryAttention,
            hidden,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            rotary=rotary,
            causal=True,
            bias=config.attention_bias,
            scale=config.query_pre_attn_scalar**-0.5,
            soft_cap=config.attn_logit_softcapping,
        )
        layers = [
            DecoderLayer(
                attention(window=config.window(layer)),
                GatedMLP(hidden, config.intermediate_size, config.hidden_activation),
                norm,
                norms="around",
            )
            for layer in range(config.num_hidden_layers)
        ]
        super().__init__(config, layers, norm(), embed_scale=hidden**0.5)

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names as Gemma2Model and its task models save them, with or without `model.`."""
        return WeightMap(
            prefixes=("model",),
            fuse={
                "layers.*.self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
                "layers.*.mlp.gate_up_proj": ("gate_proj", "up_proj"),
            },
            tie={"lm_head.weight": "embed_tokens.weight"} if config.tie_word_embeddings else {},
            # Frequencies that old checkpoints hold.
            ignore=("**.rotary_emb.inv_freq",),
        )


class Gemma2LanguageModelHead(LanguageModelHead):
    """Logits with a cap."""

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__(config, soft_cap=config.final_logit_softcapping)


class Gemma2TokenClassificationHead(TokenClassificationHead):
    """Labels of tokens; the layer is called `score` in checkpoints."""

    layer = "score"


class Gemma2ForCausalLM(Model):
    """Gemma2 that generates."""

    task = Task.GENERATE


class Gemma2ForEmbeddings(Model):
    """Gemma2 for embeddings."""

    task = Task.EMBED
