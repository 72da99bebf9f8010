"""Look-up tables: words, positions, token types.

Decides how an id becomes a row. Knows nothing of what the ids mean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorax_core.linear_methods.base import LinearKernel
from lorax_core.modeling.prepared import PreparedSite


class Embedding(PreparedSite):
    """ids `[tokens]` to rows `[tokens, dim]`. An embedding that a head is tied to shares the head's prepared weight.

    Rows are multiplied by `scale`, which is rounded to their dtype first, as transformers does (Gemma).
    """

    def __init__(self, num_embeddings: int, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.in_features = num_embeddings
        self.out_features = dim
        self.weight = nn.Parameter(torch.empty(num_embeddings, dim), requires_grad=False)
        self.bias = None

    def compute(self, x: Tensor, kernel: LinearKernel) -> Tensor:
        """Rows `[tokens, dim]` of the table in `kernel` for ids `[tokens]`."""
        # Through the kernel, because a tied table may exist only in a packed layout (`prepare_linears`).
        rows = kernel.rows(x)
        if self.scale == 1.0:
            return rows
        # A number of Python: one on the device would be copied there in every step, which no graph may capture.
        return rows * torch.tensor(self.scale, dtype=rows.dtype).item()
