"""The attention layer of every backbone.

Decides what a layer asks of the step's attention, and folds an unusual scale into the queries. Knows nothing of how a backend
computes, nor of pages.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lorax_core.attention.base import AttentionSpec
from lorax_core.kernels.elementwise import Angles, HasElementwise
from lorax_core.modeling.batch import Batch
from lorax_core.untrusted import is_number


class Attention(nn.Module, HasElementwise):
    """q `[tokens, heads, dim]`, k and v `[tokens, kv_heads, dim]` to `[tokens, heads * dim]`; rotated first by `angles`.

    `index` numbers the attention layers of a model, set when a `Model` is put together. `k_scale` and `v_scale` are those of
    an 8-bit cache, from checkpoints that have them. `scale` is what scores are multiplied with; backends use
    `head_dim ** -0.5`, so another scale is folded into q.

    Raises ValueError for a scale, window, cap or number of heads that no layer can have.
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
        if scale is not None and not (is_number(scale) and scale > 0):
            raise ValueError(f"a scale of {scale!r}; scores are multiplied with a number above 0")
        self.spec = AttentionSpec(heads, kv_heads, head_dim, causal, window, soft_cap)
        # Every backend multiplies scores by head_dim ** -0.5, so only the ratio of the wanted scale to that is left for q.
        # GPT-2 needs it: scores unscaled, or divided by the layer's number.
        self.q_factor = 1.0 if scale is None else scale * math.sqrt(head_dim)

    if TYPE_CHECKING:

        def __call__(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, angles: Angles | None = None) -> Tensor: ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, angles: Angles | None = None) -> Tensor:
        assert batch.attention is not None, "a batch whose attention was not planned"
        if self.q_factor != 1.0:
            # Before the rotation in the backend, which is linear, so the order does not matter. Not in place: q is a view of
            # the fused projection's output. Skipped at 1.0, as most models would pay a kernel launch per layer for nothing.
            q = q * self.q_factor
        return batch.attention.forward(self, q, k, v, angles).reshape(q.shape[0], -1)  # [tokens, heads * dim]
