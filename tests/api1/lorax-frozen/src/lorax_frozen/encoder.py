"""BERT: core's encoder, its parts put together once more."""

from __future__ import annotations

from torch import Tensor, nn

from lorax_core.modeling import (
    Batch,
    FirstTokenClassificationHead,
    ModelConfig,
    PostNormEmbeddings,
    PostNormEncoder,
    PostNormLayer,
)
from lorax_core.weights import WeightMap, post_norm_map
from lorax_frozen.config import BertConfig


class OwnEmbeddings(PostNormEmbeddings):
    """Core's, with the positions that core has."""

    def positions(self, batch: Batch) -> Tensor:
        return batch.position_ids


class BertBackbone(PostNormEncoder):
    """A batch to hidden rows `[tokens, hidden]`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, OwnEmbeddings(config))
        self.layers = nn.ModuleList(PostNormLayer(config) for _ in range(config.num_hidden_layers))

    @staticmethod
    def weight_map(config: ModelConfig) -> WeightMap:
        """Names as transformers saves them."""
        return post_norm_map("bert", "cls.**", "qa_outputs.**")


class PoolerHead(FirstTokenClassificationHead):
    """The pooler, then the classifier."""

    dense = "pooler.dense"
    output = "classifier"
    act = "tanh"
