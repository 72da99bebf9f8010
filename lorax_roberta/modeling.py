"""RoBERTa's encoder, post-norm transformer blocks that see in both directions, and the one head that is RoBERTa's own.

Computes hidden rows of packed texts. Knows nothing of files, batching or adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

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
from lorax_roberta.config import RobertaConfig


def text_positions(input_ids: Tensor, position_ids: Tensor, padding: int) -> Tensor:
    """Rows of the position table for packed texts, `[tokens]`: tokens count from `padding + 1`, padding ids stay at it.

    A padding id inside a text does not count, as in transformers. `position_ids` count from 0 in each text.
    """
    real = (input_ids != padding).long()
    seen = real.cumsum(0)  # over the whole batch, so what came before the own text is taken off
    first = torch.arange(len(input_ids), device=input_ids.device) - position_ids
    return (seen - (seen - real)[first]) * real + padding


class RobertaEmbeddings(nn.Module):
    """Word, position and token type, summed and normalised."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.padding = config.padding
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, batch: Batch) -> Tensor:
        positions = text_positions(batch.input_ids, batch.position_ids, self.padding)
        words = self.word_embeddings(batch.input_ids, batch)  # [tokens, hidden]
        types = self.token_type_embeddings(batch.token_type_ids, batch)
        return cast("Tensor", self.LayerNorm(words + types + self.position_embeddings(positions, batch), batch))


class FlashRobertaModel(nn.Module):
    """Embeddings and layers: a batch to hidden rows `[tokens, hidden]`."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.embeddings = RobertaEmbeddings(config)
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
        """Names as RobertaModel and its task models save them, with or without `roberta.`, old LayerNorm names too."""
        return WeightMap(
            prefixes=("roberta",),
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
            ignore=("embeddings.position_ids", "pooler.**", "lm_head.**", "qa_outputs.**"),
        )


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
