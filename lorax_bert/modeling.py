"""BERT: an encoder that normalises after its residuals.

Decides what sets BERT apart from core's encoder. Knows nothing of files, batching or adapters.
"""

from __future__ import annotations

from lorax_core.modeling import FirstTokenClassificationHead, Model, ModelConfig, PostNormEncoder, Task
from lorax_core.weights import WeightMap, post_norm_map


class FlashBertModel(PostNormEncoder):
    """A batch to hidden rows `[tokens, hidden]`."""

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:  # noqa: ARG004
        """Names as BertModel and its task models save them, with or without `bert.`."""
        # The heads of masked-language, next-sentence and question-answering checkpoints, which no task here reads.
        return post_norm_map("bert", "cls.**", "qa_outputs.**")


class BertSequenceClassificationHead(FirstTokenClassificationHead):
    """Labels of a sequence: the pooler that BERT was trained with, then the classifier."""

    # The pooler is a module of BertModel in transformers, beside and not inside the classifier; tanh is its activation.
    dense = "pooler.dense"
    output = "classifier"


class FlashBert(Model):
    """BERT for embeddings."""

    task = Task.EMBED


class FlashBertForTokenClassification(Model):
    """BERT that labels tokens."""

    task = Task.TOKEN_CLASSIFICATION


class FlashBertForSequenceClassification(Model):
    """BERT that labels sequences."""

    task = Task.SEQUENCE_CLASSIFICATION


class FlashBertModelForClassification(FlashBertForTokenClassification):
    """LoRAX's name for BERT that labels tokens."""
