"""BERT's encoder, post-norm transformer blocks that see in both directions, and the one head that is BERT's own.

Computes hidden rows of packed texts. Knows nothing of files, batching or adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lorax_bert.config import BertConfig
from lorax_core.modeling import (
    Batch,
    Embedding,
    HasAdapters,
    LayerNorm,
    Linear,
    Model,
    ModelConfig,
    PostNormLayer,
    SequenceClassificationHead,
    Task,
)
from lorax_core.weights import WeightMap


class BertEmbeddings(nn.Module):
    """Word, position and token type, summed and normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, batch: Batch) -> Tensor:
        words = self.word_embeddings(batch.input_ids, batch)  # [tokens, hidden]
        types = self.token_type_embeddings(batch.token_type_ids, batch)
        positions = self.position_embeddings(batch.position_ids, batch)
        return cast("Tensor", self.LayerNorm(words + types + positions, batch))


class FlashBertModel(nn.Module):
    """Embeddings and layers: a batch to hidden rows `[tokens, hidden]`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        width = config.hidden_size, config.num_attention_heads, config.intermediate_size
        self.layers = nn.ModuleList(
            PostNormLayer(*width, config.hidden_act, config.layer_norm_eps) for _ in range(config.num_hidden_layers)
        )

    def forward(self, batch: Batch) -> Tensor:
        x: Tensor = self.embeddings(batch)
        for layer in self.layers:
            x = layer(x, batch)
        return x

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:  # noqa: ARG004
        """Names as BertModel and its task models save them, with or without `bert.`, old LayerNorm names too."""
        return WeightMap(
            prefixes=("bert",),
            rename={
                "embeddings.LayerNorm.gamma": "embeddings.LayerNorm.weight",
                "embeddings.LayerNorm.beta": "embeddings.LayerNorm.bias",
                "encoder.layer.*.attention.output.LayerNorm.gamma": "layers.*.attention.LayerNorm.weight",
                "encoder.layer.*.attention.output.LayerNorm.beta": "layers.*.attention.LayerNorm.bias",
                "encoder.layer.*.output.LayerNorm.gamma": "layers.*.LayerNorm.weight",
                "encoder.layer.*.output.LayerNorm.beta": "layers.*.LayerNorm.bias",
                "encoder.layer.*.attention.self.**": "layers.*.attention.**",
                "encoder.layer.*.attention.output.**": "layers.*.attention.**",
                "encoder.layer.*.intermediate.dense.**": "layers.*.intermediate.**",
                "encoder.layer.*.output.dense.**": "layers.*.output.**",
                "encoder.layer.*.output.LayerNorm.**": "layers.*.LayerNorm.**",
            },
            fuse={"layers.*.attention.qkv": ("query", "key", "value")},
            # Heads that are not served, and position numbers that old checkpoints hold.
            ignore=("embeddings.position_ids", "pooler.**", "cls.**", "qa_outputs.**"),
        )


class BertSequenceClassificationHead(SequenceClassificationHead):
    """Labels of a text from its first row: the pooler that BERT was trained with, then the classifier."""

    needed = ("pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.pooler = nn.ModuleDict({"dense": Linear(config.hidden_size, config.hidden_size)})
        self.classifier = Linear(config.hidden_size, len(self.labels))

    def span(self, ids: Sequence[int], pool_from: int) -> range:
        return range(1)

    def logits(self, hidden: Tensor, rows: HasAdapters) -> Tensor:
        pooled = torch.tanh(self.pooler["dense"](hidden, rows))  # [sequences, hidden]
        logits: Tensor = self.classifier(pooled, rows)
        return logits


class FlashBert(Model):
    """BERT for embeddings."""

    task = Task.EMBED


class FlashBertForTokenClassification(Model):
    """BERT that labels tokens."""

    task = Task.TOKEN_CLASSIFICATION


class FlashBertForSequenceClassification(Model):
    """BERT that labels texts."""

    task = Task.SEQUENCE_CLASSIFICATION
