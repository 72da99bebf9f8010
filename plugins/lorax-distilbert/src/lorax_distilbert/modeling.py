"""DistilBert: an encoder with learned positions, no token types and norms after its residuals.

Decides what sets DistilBert apart from core's encoder. Knows nothing of files, batching or adapters.
"""

from __future__ import annotations

from lorax_core.modeling import FirstTokenClassificationHead, Model, ModelConfig, PostNormEncoder, Task
from lorax_core.weights import WeightMap


class DistilBertBackbone(PostNormEncoder):
    """A batch to hidden rows `[tokens, hidden]`."""

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:  # noqa: ARG004
        """Names as DistilBertModel and its task models save them, with or without `distilbert.`."""
        return WeightMap(
            prefixes=("distilbert",),
            rename={
                "transformer.layer.*.sa_layer_norm.**": "layers.*.post_attention_layernorm.**",
                "transformer.layer.*.output_layer_norm.**": "layers.*.post_mlp_layernorm.**",
                "transformer.layer.*.attention.q_lin.**": "layers.*.self_attn.q_proj.**",
                "transformer.layer.*.attention.k_lin.**": "layers.*.self_attn.k_proj.**",
                "transformer.layer.*.attention.v_lin.**": "layers.*.self_attn.v_proj.**",
                "transformer.layer.*.attention.out_lin.**": "layers.*.self_attn.o_proj.**",
                "transformer.layer.*.ffn.lin2.**": "layers.*.mlp.down_proj.**",
                "transformer.layer.*.ffn.lin1.**": "layers.*.mlp.up_proj.**",
            },
            fuse={
                "layers.*.self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
            },
            # Numbers that old checkpoints hold, and heads that are not supported.
            ignore=(
                "embeddings.position_ids",
                "vocab_layer_norm.**",
                "vocab_projector.**",
                "vocab_transform.**",
                "qa_outputs.**",
            ),
        )


class DistilBertSequenceClassificationHead(FirstTokenClassificationHead):
    """Labels of a text: a dense layer with relu, then the layer that gives them."""

    dense = "pre_classifier"
    output = "classifier"
    act = "relu"


class DistilBertForEmbeddings(Model):
    """DistilBert for embeddings."""

    task = Task.EMBED


class DistilBertForTokenClassification(Model):
    """DistilBert that labels tokens."""

    task = Task.TOKEN_CLASSIFICATION


class DistilBertForSequenceClassification(Model):
    """DistilBert that labels texts."""

    task = Task.SEQUENCE_CLASSIFICATION
