"""ModernBERT: an encoder with rotary positions, windows in most layers, norms before its blocks and gated feed-forward blocks.

Decides what sets ModernBERT apart from core's blocks. Knows nothing of files, batching or adapters.
"""

from __future__ import annotations

from collections.abc import Set
from functools import partial
from typing import Self

from lorax_core.modeling import (
    Decoder,
    DecoderLayer,
    GatedMLP,
    HeadTransform,
    LayerNorm,
    Model,
    ModelConfig,
    PooledClassificationHead,
    RotaryAttention,
    RotaryEmbedding,
    Task,
    TokenClassificationHead,
)
from lorax_core.weights import WeightMap
from lorax_modernbert.config import ModernBertConfig


class ModernBertTransform(HeadTransform):
    """What ModernBERT's heads, that of its pretraining among them, compute before their last layer."""

    def __init__(self, config: ModernBertConfig) -> None:
        norm = LayerNorm(config.hidden_size, config.norm_eps, config.norm_bias)
        super().__init__(config.hidden_size, config.classifier_activation, norm, bias=config.classifier_bias)


class ModernBertBackbone(Decoder):
    """A batch to hidden rows `[tokens, hidden]`: a decoder's form, whose rows see both sides."""

    def __init__(self, config: ModernBertConfig) -> None:
        hidden, heads = config.hidden_size, config.num_attention_heads
        norm = partial(LayerNorm, hidden, config.norm_eps, config.norm_bias)
        # Layers of one kind rotate the same way.
        rotary = {kind: RotaryEmbedding(hidden // heads, rope) for kind, rope in config.rope.items()}
        attention = partial(RotaryAttention, hidden, heads, causal=False, bias=config.attention_bias)
        layers = [
            DecoderLayer(
                attention(rotary=rotary[kind], window=config.window(at)),
                GatedMLP(hidden, config.intermediate_size, config.hidden_activation, config.mlp_bias),
                norm,
                # What the first layer reads was normalised already.
                norms="before" if at else "between",
            )
            for at, kind in enumerate(config.layer_types)
        ]
        super().__init__(config, layers, norm(), embed_norm=norm())

    @staticmethod
    def weight_map(config: ModernBertConfig) -> WeightMap:
        """Names as ModernBertModel and its task models save them, with or without `model.`."""
        names = {
            "embeddings.tok_embeddings": "embed_tokens",
            "embeddings.norm": "embed_norm",
            "layers.*.attn_norm": "layers.*.input_layernorm",
            "layers.*.attn.Wqkv": "layers.*.self_attn.qkv_proj",
            "layers.*.attn.Wo": "layers.*.self_attn.o_proj",
            "layers.*.mlp_norm": "layers.*.post_attention_layernorm",
            "layers.*.mlp.Wi": "layers.*.mlp.gate_up_proj",
            "layers.*.mlp.Wo": "layers.*.mlp.down_proj",
            "final_norm": "norm",
            "head": "transform",
        }
        # Heads of masked language modelling, question answering and multiple choice.
        unread = ["transform.dense.weight", "transform.norm.weight", "decoder.*", "classifier.*"]
        unread += ["transform.dense.bias"] * config.classifier_bias + ["transform.norm.bias"] * config.norm_bias
        return WeightMap(
            prefixes=("model",),
            rename={f"{stored}.**": f"{name}.**" for stored, name in names.items()},
            ignore=tuple(unread),
        )


class ModernBertTokenClassificationHead(TokenClassificationHead):
    """Labels of tokens."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config, ModernBertTransform(config))

    @classmethod
    def build(cls, config: ModelConfig, names: Set[str], stated: Task | None) -> Self | None:
        # Other heads have tensors of the same names, and no labels.
        return None if stated is Task.EMBED else super().build(config, names, stated)


class ModernBertSequenceClassificationHead(PooledClassificationHead):
    """Labels of a sequence, of its first row or of the mean of all."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config, ModernBertTransform(config), pooling=config.classifier_pooling)

    @classmethod
    def build(cls, config: ModelConfig, names: Set[str], stated: Task | None) -> Self | None:
        return None if stated is Task.EMBED else super().build(config, names, stated)


class ModernBertForEmbeddings(Model):
    """ModernBERT for embeddings."""

    task = Task.EMBED
