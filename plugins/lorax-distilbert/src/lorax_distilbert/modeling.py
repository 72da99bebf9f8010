"""DistilBERT's encoder, post-norm transformer blocks that see in both directions, and its head for whole texts.

Modules are named as transformers names them, so checkpoints fit as they are. Knows nothing of files, batching or adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn.functional import relu

from lorax_core.modeling import (
    Attention,
    Batch,
    Embedding,
    HasAdapters,
    LayerNorm,
    Linear,
    ModelConfig,
    QKVLinear,
    SequenceClassificationHead,
    get_activation,
)
from lorax_core.weights import WeightMap
from lorax_distilbert.config import DistilBertConfig

EPS = 1e-12


class DistilBertEmbeddings(nn.Module):
    """Word and position, summed and normalised."""

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, EPS)

    def forward(self, batch: Batch) -> Tensor:
        words = self.word_embeddings(batch.input_ids, batch)  # [tokens, hidden]
        positions = self.position_embeddings(batch.position_ids, batch)
        return cast("Tensor", self.LayerNorm(words + positions, batch))


class DistilBertAttention(nn.Module):
    """Self-attention in both directions."""

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__()
        heads = config.num_attention_heads
        dim = config.hidden_size // heads
        self.qkv = QKVLinear(config.hidden_size, heads, heads, dim)
        self.attention = Attention(heads, heads, dim, causal=False)
        self.out_lin = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        q, k, v = self.qkv.project(x, batch)  # [tokens, heads, dim] each
        return cast("Tensor", self.out_lin(self.attention(q, k, v, batch), batch))


class DistilBertFFN(nn.Module):
    """`lin2(act(lin1))`."""

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__()
        self.lin1 = Linear(config.hidden_size, config.hidden_dim)
        self.act = get_activation(config.activation)
        self.lin2 = Linear(config.hidden_dim, config.hidden_size)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        inner = self.act(self.lin1(x, batch))  # [tokens, hidden_dim]
        return cast("Tensor", self.lin2(inner, batch))


class DistilBertBlock(nn.Module):
    """Attention, then a feed-forward layer, each normalised after its residual."""

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__()
        self.attention = DistilBertAttention(config)
        self.sa_layer_norm = LayerNorm(config.hidden_size, EPS)
        self.ffn = DistilBertFFN(config)
        self.output_layer_norm = LayerNorm(config.hidden_size, EPS)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        x = self.sa_layer_norm(self.attention(x, batch) + x, batch)
        return cast("Tensor", self.output_layer_norm(self.ffn(x, batch) + x, batch))


class DistilBertBackbone(nn.Module):
    """Embeddings and blocks: a batch to hidden rows `[tokens, hidden]`."""

    def __init__(self, config: DistilBertConfig) -> None:
        super().__init__()
        self.embeddings = DistilBertEmbeddings(config)
        blocks = nn.ModuleList(DistilBertBlock(config) for _ in range(config.num_hidden_layers))
        self.transformer = nn.ModuleDict({"layer": blocks})

    def forward(self, batch: Batch) -> Tensor:
        x: Tensor = self.embeddings(batch)
        for block in cast("nn.ModuleList", self.transformer["layer"]):
            x = block(x, batch)
        return x

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:  # noqa: ARG004
        """Names as DistilBertModel and its task models save them, with or without `distilbert.`."""
        return WeightMap(
            prefixes=("distilbert",),
            fuse={"transformer.layer.*.attention.qkv": ("q_lin", "k_lin", "v_lin")},
            # Heads that are not served, and position numbers that old checkpoints hold.
            ignore=(
                "embeddings.position_ids",
                "vocab_transform.**",
                "vocab_layer_norm.**",
                "vocab_projector.**",
                "qa_outputs.**",
            ),
        )


class DistilBertSequenceClassificationHead(SequenceClassificationHead):
    """Labels of a text from its first row: a dense layer with ReLU, then the classifier."""

    needed = ("pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.pre_classifier = Linear(config.hidden_size, config.hidden_size)
        self.classifier = Linear(config.hidden_size, len(self.labels))

    def span(self, ids: Sequence[int], pool_from: int) -> range:
        return range(1)

    def logits(self, hidden: Tensor, rows: HasAdapters) -> Tensor:
        pooled = relu(self.pre_classifier(hidden, rows))  # [sequences, hidden]
        return cast("Tensor", self.classifier(pooled, rows))
