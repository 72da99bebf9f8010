"""What blocks do to rows beside matrix products: rotating, normalising, gating.

Decides the arithmetic, one readable function each, with the order of operations of transformers. Functions are pure; a compiled
form of one must give the same numbers. Knows nothing of layers, adapters or batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Angles(NamedTuple):
    """Cosine and sine of rotary positions, each `[tokens, 1, rotary_dim / 2]`."""

    cos: Tensor
    sin: Tensor


def rotate(q: Tensor, k: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
    """q `[tokens, heads, dim]` and k `[tokens, kv_heads, dim]` with the first `rotary_dim` of each head rotated.

    Half-split: dimension i of the first half and dimension i of the second half are one pair.
    """
    return _rotated(q, angles), _rotated(k, angles)


def _rotated(x: Tensor, angles: Angles) -> Tensor:
    cos, sin = angles  # [tokens, 1, rotary_dim / 2]; the 1 stands for the heads
    half = cos.shape[-1]
    # `rest` is empty unless rotary_dim is less than the head's (GPT-NeoX's rotary_pct).
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension of x `[rows, size]`."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * (offset + weight)` over the last dimension of x `[rows, size]`; statistics in float32."""
    normed = F.rms_norm(x.float(), x.shape[-1:], None, eps)  # [rows, size]
    if offset:
        # transformers' Gemma multiplies before it rounds, its Llama after; 16 bit shows the difference.
        return (normed * (offset + weight.float())).to(x.dtype)
    return normed.to(x.dtype) * weight


def add_norm(x: Tensor, residual: Tensor, norm: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """`norm(x + residual)` and the sum itself, which is the next residual; all `[rows, size]`."""
    total = x + residual  # [rows, size]
    return norm(total), total


def gated_act(gate_up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """`act(gate) * up` of gate_up `[rows, 2 * intermediate]`, whose first half is the gate."""
    gate, up = gate_up.chunk(2, dim=-1)  # [rows, intermediate] each
    return act(gate) * up
