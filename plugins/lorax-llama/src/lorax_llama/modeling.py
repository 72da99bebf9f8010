"""Llama: a decoder with rotary positions, grouped queries and a gated feed-forward block.

Decides what sets Llama apart from core's decoder. Knows nothing of caches, files or adapters.
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
from lorax_llama.config import LlamaConfig


class LlamaBackbone(Decoder):
    """A batch to hidden rows `[tokens, hidden]`."""

    def __init__(self, config: LlamaConfig) -> None:
        hidden = config.hidden_size
        norm = partial(RMSNorm, hidden, eps=config.rms_norm_eps)
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
            window=config.window,
            bias=config.attention_bias,
        )
        layers = [
            DecoderLayer(
                attention(), GatedMLP(hidden, config.intermediate_size, config.hidden_act, bias=config.mlp_bias), norm
            )
            for _ in range(config.num_hidden_layers)
        ]
        super().__init__(config, layers, norm())

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names as LlamaModel, MistralModel and their task models save them, with or without `model.`."""
        return WeightMap(
            prefixes=("model", "transformer"),
            fuse={
                "layers.*.self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
                "layers.*.mlp.gate_up_proj": ("gate_proj", "up_proj"),
            },
            tie={"lm_head.weight": "embed_tokens.weight"} if config.tie_word_embeddings else {},
            # Frequencies that old checkpoints hold, and heads that are not supported.
            ignore=("**.rotary_emb.inv_freq", "qa_outputs.**"),
        )


class LlamaTokenClassificationHead(TokenClassificationHead):
    """Labels of tokens; the layer is called `score` in checkpoints."""

    layer = "score"


class LlamaForCausalLM(Model):
    """Llama that generates."""

    task = Task.GENERATE


class LlamaForEmbeddings(Model):
    """Llama for embeddings."""

    task = Task.EMBED
