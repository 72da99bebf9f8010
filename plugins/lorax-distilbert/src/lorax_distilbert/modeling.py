"""DistilBERT: BERT's encoder without token types.

Decides what sets DistilBERT apart from core's encoder. Knows nothing of files, batching or adapters.
"""

from __future__ import annotations

from lorax_core.modeling import FirstTokenClassificationHead, Model, ModelConfig, PostNormEncoder, Task
from lorax_core.weights import WeightMap


class DistilBertBackbone(PostNormEncoder):
    """A batch to hidden rows `[tokens, hidden]`."""

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:  # noqa: ARG004
        """Names as DistilBertModel and its task models save them, with or without `distilbert.`."""
        names = {
            # Before "attention": the first pattern that matches wins.
            "attention.out_lin": "self_attn.o_proj",
            "attention": "self_attn",
            "sa_layer_norm": "post_attention_layernorm",
            "ffn.lin1": "mlp.up_proj",
            "ffn.lin2": "mlp.down_proj",
            "output_layer_norm": "post_mlp_layernorm",
        }
        return WeightMap(
            prefixes=("distilbert",),
            rename={f"transformer.layer.*.{stored}.**": f"layers.*.{name}.**" for stored, name in names.items()},
            # Not post_norm_map: DistilBERT names its modules unlike BERT.
            fuse={"layers.*.self_attn.qkv_proj": ("q_lin", "k_lin", "v_lin")},
            # Heads that are not supported, and position numbers that old checkpoints hold.
            ignore=(
                "embeddings.position_ids",
                "vocab_transform.**",
                "vocab_layer_norm.**",
                "vocab_projector.**",
                "qa_outputs.**",
            ),
        )


class DistilBertSequenceClassificationHead(FirstTokenClassificationHead):
    """Labels of a sequence: a dense layer with ReLU, then the classifier."""

    dense = "pre_classifier"
    output = "classifier"
    act = "relu"


class DistilBert(Model):
    """DistilBERT for embeddings."""

    task = Task.EMBED


class DistilBertForTokenClassification(Model):
    """DistilBERT that labels tokens."""

    task = Task.TOKEN_CLASSIFICATION


class DistilBertForSequenceClassification(Model):
    """DistilBERT that labels sequences."""

    task = Task.SEQUENCE_CLASSIFICATION
