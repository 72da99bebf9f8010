"""The attention layer of every backbone.

Decides which path a model takes (through the paged cache when causal, inside the batch when not) and folds an unusual scale
into the queries. Knows nothing of how a backend computes, nor of pages.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from lorax_core.attention.base import AttentionSpec
from lorax_core.modeling.batch import Batch


class Attention(nn.Module):
    """q `[tokens, heads, dim]`, k and v `[tokens, kv_heads, dim]` to `[tokens, heads * dim]`.

    `index` numbers the attention layers of a model, set when a `Model` is put together. `k_scale` and `v_scale` are those of
    an 8-bit cache, from checkpoints that have them. `scale` is what scores are
    multiplied with; backends use `head_dim ** -0.5`, so another scale is folded into q.
    """

    index: int = 0
    k_scale: float = 1.0
    v_scale: float = 1.0

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        causal: bool,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__()
        self.spec = AttentionSpec(heads, kv_heads, head_dim, causal, window, soft_cap)
        self.q_factor = 1.0 if scale is None else scale * math.sqrt(head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        assert batch.attention is not None, "a batch without an attention backend"
        if self.q_factor != 1.0:
            q = q * self.q_factor
        if self.spec.causal:
            assert batch.kv is not None, "a causal model's batch without a cache"
            assert batch.slots is not None, "a causal model's batch without slots"
            batch.kv.write(self.index, k, v, batch.slots)
            out = batch.attention.attend(q, self, batch)
        else:
            out = batch.attention.encode(q, k, v, self, batch)
        return out.reshape(q.shape[0], -1)  # [tokens, heads * dim]
