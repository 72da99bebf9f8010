"""Elementwise parts of a layer, in their readable form.

Decides the arithmetic. Knows nothing of layers, adapters or caches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Angles(NamedTuple):
    """Cosines and sines of rotary positions, each `[tokens, 1, rotary_dim / 2]`."""

    cos: Tensor
    sin: Tensor


def rotate(q: Tensor, k: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
    """q `[tokens, heads, dim]` and k `[tokens, kv_heads, dim]` rotated."""
    return _rotated(q, angles), _rotated(k, angles)


def _rotated(x: Tensor, angles: Angles) -> Tensor:
    cos, sin = angles
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
