"""Transformer blocks that several architectures share.

Decides the order of norms, residuals and products inside a block. Knows nothing of checkpoints: what its modules are called
there is each architecture's map to say.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from lorax_core.modeling.activation import get_activation
from lorax_core.modeling.attention import Attention
from lorax_core.modeling.batch import Batch
from lorax_core.modeling.linear import Linear, QKVLinear
from lorax_core.modeling.norm import LayerNorm


class PostNormAttention(nn.Module):
    """Bidirectional self-attention, normalised after its residual: x `[tokens, hidden]` to the same shape."""

    def __init__(self, hidden: int, heads: int, eps: float) -> None:
        super().__init__()
        dim = hidden // heads
        self.qkv = QKVLinear(hidden, heads, heads, dim)
        self.attention = Attention(heads, heads, dim, causal=False)
        self.dense = Linear(hidden, hidden)
        self.LayerNorm = LayerNorm(hidden, eps)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        q, k, v = self.qkv.project(x, batch)  # [tokens, heads, dim] each
        attended = self.dense(self.attention(q, k, v, batch), batch)
        return cast("Tensor", self.LayerNorm(attended + x, batch))


class PostNormLayer(nn.Module):
    """BERT's block: attention, then a feed-forward layer with activation `act`, each normalised after its residual."""

    def __init__(self, hidden: int, heads: int, intermediate: int, act: str, eps: float) -> None:
        super().__init__()
        self.attention = PostNormAttention(hidden, heads, eps)
        self.intermediate = Linear(hidden, intermediate)
        self.act = get_activation(act)
        self.output = Linear(intermediate, hidden)
        self.LayerNorm = LayerNorm(hidden, eps)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        x = self.attention(x, batch)
        inner = self.act(self.intermediate(x, batch))  # [tokens, intermediate]
        return cast("Tensor", self.LayerNorm(self.output(inner, batch) + x, batch))
