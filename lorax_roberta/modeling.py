"""RoBERTa: BERT's encoder with positions that are counted from the padding id.

Decides what sets RoBERTa apart from core's encoder. Knows nothing of files, batching or adapters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorax_core.modeling import (
    Batch,
    FirstTokenClassificationHead,
    Model,
    ModelConfig,
    PostNormEmbeddings,
    PostNormEncoder,
    Task,
)
from lorax_core.weights import WeightMap, post_norm_map
from lorax_roberta.config import RobertaConfig


def text_positions(input_ids: Tensor, position_ids: Tensor, padding: int) -> Tensor:
    """Rows of the position table for packed sequences, `[tokens]`: tokens count from `padding + 1`, padding ids stay at it.

    A padding id inside a sequence does not count, as in transformers. `position_ids` count from 0 in each sequence.
    """
    real = (input_ids != padding).long()
    seen = real.cumsum(0)  # over the whole batch, so what came before the sequence is taken off
    # [tokens]: the row in the batch where the sequence of each token begins.
    first = torch.arange(len(input_ids), device=input_ids.device) - position_ids
    # `seen - real` is the count before a row, itself not counted. `* real` puts padding ids at `padding` exactly.
    return (seen - (seen - real)[first]) * real + padding


class RobertaEmbeddings(PostNormEmbeddings):
    """Word, position and token type, where positions begin after the padding id."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        self.padding = config.padding

    def positions(self, batch: Batch) -> Tensor:
        return text_positions(batch.input_ids, batch.position_ids, self.padding)


class FlashRobertaModel(PostNormEncoder):
    """A batch to hidden rows `[tokens, hidden]`."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config, RobertaEmbeddings(config))

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:  # noqa: ARG004
        """Names as RobertaModel and its task models save them, with or without `roberta.`."""
        return post_norm_map("roberta", "lm_head.**", "qa_outputs.**")


class RobertaSequenceClassificationHead(FirstTokenClassificationHead):
    """Labels of a sequence, through two layers of the head's own."""

    # Unlike BERT's, both layers belong to the classifier; RoBERTa was trained without a pooler.
    dense = "classifier.dense"
    output = "classifier.out_proj"


class FlashXlmRoberta(Model):
    """RoBERTa or a model of its family for embeddings."""

    task = Task.EMBED


class FlashRobertaForTokenClassification(Model):
    """RoBERTa or a model of its family that labels tokens."""

    task = Task.TOKEN_CLASSIFICATION


class FlashRobertaForSequenceClassification(Model):
    """RoBERTa or a model of its family that labels sequences."""

    task = Task.SEQUENCE_CLASSIFICATION
