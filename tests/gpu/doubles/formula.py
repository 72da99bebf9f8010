"""Attention of one sequence, as FlashAttention 2 and FlashInfer both define it."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    left: int = -1,
    right: int = -1,
    soft_cap: float = 0.0,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q `[rows, heads, dim]` over k and v `[keys, kv_heads, dim]`: the answer, and log-sum-exp `[heads, rows]` in base e.

    The last row sees the last key. `left` and `right` count keys beside the row's own; -1 is all. Rows without a key are 0,
    their log-sum-exp -inf.
    """
    rows, keys, group = len(q), len(k), q.shape[1] // k.shape[1]
    k, v = (one.float().repeat_interleave(group, 1) for one in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    if soft_cap > 0:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    own, at = torch.arange(keys - rows, keys)[:, None], torch.arange(keys)
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if causal:
        seen &= at <= own
    if right >= 0:
        seen &= at <= own + right
    if left >= 0:
        seen &= at >= own - left
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = torch.nan_to_num(scores.softmax(-1), nan=0.0)
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype), scores.logsumexp(-1)
