"""Qwen3: a decoder with rotary positions, grouped queries, norms of queries and keys and a gated feed-forward block.

Decides what sets Qwen3 apart from core's decoder. Knows nothing of caches, files or adapters.
"""

from __future__ import annotations

from functools import partial

from lorax_core.modeling import (
    Decoder,
    DecoderLayer,
    GatedMLP,
    LogitScoreHead,
    Model,
    ModelConfig,
    RMSNorm,
    RotaryAttention,
    RotaryEmbedding,
    Task,
    TokenClassificationHead,
)
from lorax_core.weights import WeightMap
from lorax_qwen3.config import Qwen3Config


class Qwen3Backbone(Decoder):
    """A batch to hidden rows `[tokens, hidden]`."""

    def __init__(self, config: Qwen3Config) -> None:
        hidden = config.hidden_size
        sized_norm = partial(RMSNorm, eps=config.rms_norm_eps)
        norm = partial(sized_norm, hidden)
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
            qk_norm=sized_norm,
        )
        layers = [
            DecoderLayer(
                attention(window=config.window(layer)),
                GatedMLP(hidden, config.intermediate_size, config.hidden_act),
                norm,
            )
            for layer in range(config.num_hidden_layers)
        ]
        super().__init__(config, layers, norm())

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names as Qwen3Model and its task models save them, with or without `model.`."""
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


class Qwen3TokenClassificationHead(TokenClassificationHead):
    """Labels of tokens; the layer is called `score` in checkpoints."""

    layer = "score"


class Qwen3ScoreHead(LogitScoreHead):
    """The logit of one token less that of another, after the prompt that Qwen3's rerankers were trained with."""

    pair_template = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
        "<Query>: {{ messages[0].content }}\n<Document>: {{ messages[1].content }}<|im_end|>\n"
        # In quotes, for a template loses a line feed at its end.
        '<|im_start|>assistant\n<think>\n\n</think>{{ "\n\n" }}'
    )


class Qwen3ForCausalLM(Model):
    """Qwen3 that generates."""

    task = Task.GENERATE


class Qwen3ForEmbeddings(Model):
    """Qwen3 for embeddings."""

    task = Task.EMBED
