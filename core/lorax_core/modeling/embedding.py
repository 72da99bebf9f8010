"""Look-up tables: words, positions, token types.

Decides how an id becomes a row. Knows nothing of what the ids mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorax_core.modeling.batch import HasAdapters
from lorax_core.modeling.site import Site


class Embedding(Site):
    """ids `[tokens]` to rows `[tokens, dim]`."""

    def __init__(self, num_embeddings: int, dim: int) -> None:
        super().__init__()
        self.in_features = num_embeddings
        self.out_features = dim
        self.weight = nn.Parameter(torch.empty(num_embeddings, dim), requires_grad=False)

    def forward(self, ids: Tensor, batch: HasAdapters) -> Tensor:
        return batch.adapters.apply(self, ids, F.embedding(ids, self.weight))

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(x, weight)

    def dense_weight(self) -> Tensor:
        return self.weight.detach()
