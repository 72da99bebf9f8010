"""RoBERTa's encoder, post-norm transformer blocks that see in both directions, and the one head that is RoBERTa's own.

Computes hidden rows of packed texts. Knows nothing of files, batching or adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorax_core.modeling import (
    Batch,
    HasAdapters,
    Linear,
    Model,
    ModelConfig,
    PostNormEmbeddings,
    PostNormEncoder,
    SequenceClassificationHead,
    Task,
)
from lorax_core.weights import WeightMap, post_norm_map
from lorax_roberta.config import RobertaConfig


def text_positions(input_ids: Tensor, position_ids: Tensor, padding: int) -> Tensor:
    """Rows of the position table for packed texts, `[tokens]`: tokens count from `padding + 1`, padding ids stay at it.

    A padding id inside a text does not count, as in transformers. `position_ids` count from 0 in each text.
    """
    real = (input_ids != padding).long()
    seen = real.cumsum(0)  # over the whole batch, so what came before the own text is taken off
    first = torch.arange(len(input_ids), device=input_ids.device) - position_ids
    return (seen - (seen - real)[first]) * real + padding


class RobertaEmbeddings(PostNormEmbeddings):
    """Word, position and token type, where positions begin after the padding id."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        self.padding = config.padding

    def positions(self, batch: Batch) -> Tensor:
        return text_positions(batch.input_ids, batch.position_ids, self.padding)


class FlashRobertaModel(PostNormEncoder):
    """RoBERTa's encoder: a batch to hidden rows `[tokens, hidden]`."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config, RobertaEmbeddings(config))

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:  # noqa: ARG004
        """Names as RobertaModel and its task models save them."""
        return post_norm_map("roberta", "lm_head.**", "qa_outputs.**")


class RobertaSequenceClassificationHead(SequenceClassificationHead):
    """Labels of a text from its first row, through two layers of the head's own."""

    needed = tuple(f"classifier.{layer}.{leaf}" for layer in ("dense", "out_proj") for leaf in ("weight", "bias"))

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        dense, out_proj = Linear(config.hidden_size, config.hidden_size), Linear(config.hidden_size, len(self.labels))
        self.classifier = nn.ModuleDict({"dense": dense, "out_proj": out_proj})

    def span(self, ids: Sequence[int], pool_from: int) -> range:
        return range(1)

    def logits(self, hidden: Tensor, rows: HasAdapters) -> Tensor:
        inner = torch.tanh(self.classifier["dense"](hidden, rows))  # [sequences, hidden]
        logits: Tensor = self.classifier["out_proj"](inner, rows)
        return logits


class FlashXlmRoberta(Model):
    """RoBERTa or one of its kin for embeddings."""

    task = Task.EMBED


class FlashRobertaForTokenClassification(Model):
    """RoBERTa or one of its kin that labels tokens."""

    task = Task.TOKEN_CLASSIFICATION


class FlashRobertaForSequenceClassification(Model):
    """RoBERTa or one of its kin that labels texts."""

    task = Task.SEQUENCE_CLASSIFICATION
