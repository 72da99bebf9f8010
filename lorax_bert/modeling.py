"""BERT's encoder, post-norm transformer blocks that see in both directions, and the one head that is BERT's own.

Computes hidden rows of packed texts. Knows nothing of files, batching or adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorax_core.modeling import (
    HasAdapters,
    Linear,
    Model,
    ModelConfig,
    PostNormEncoder,
    SequenceClassificationHead,
    Task,
)
from lorax_core.weights import WeightMap, post_norm_map


class FlashBertModel(PostNormEncoder):
    """BERT's encoder: a batch to hidden rows `[tokens, hidden]`."""

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:  # noqa: ARG004
        """Names as BertModel and its task models save them."""
        return post_norm_map("bert", "cls.**", "qa_outputs.**")


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


class FlashBertModelForClassification(Model):
    """BERT that labels tokens, under LoRAX's name for it."""

    task = Task.TOKEN_CLASSIFICATION


class FlashBertForTokenClassification(Model):
    """BERT that labels tokens."""

    task = Task.TOKEN_CLASSIFICATION


class FlashBertForSequenceClassification(Model):
    """BERT that labels texts."""

    task = Task.SEQUENCE_CLASSIFICATION
