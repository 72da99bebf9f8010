"""RoBERTa: BERT's encoder with positions that are counted from the padding id.

Decides what sets RoBERTa apart from core's encoder. Knows nothing of files, batching or adapters.
"""

from __future__ import annotations

from lorax_core.modeling import FirstTokenClassificationHead, Model, ModelConfig, PostNormEncoder, Task
from lorax_core.weights import WeightMap, post_norm_map


class FlashRobertaModel(PostNormEncoder):
    """A batch to hidden rows `[tokens, hidden]`."""

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
