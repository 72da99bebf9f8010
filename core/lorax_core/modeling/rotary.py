"""Rotary position embedding.

Decides how queries and keys are turned by the angle of their position. Angles are computed in float32 for the positions of
each batch and shared by all layers; nothing is cached by length, so no position is out of range.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorax_core.kernels.elementwise import Angles, rotate
from lorax_core.modeling.rope import Rope


class RotaryEmbedding(nn.Module):
    """Turns the first part of each head (`rope.partial` of it), half-split: the second half is the first one's partner."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, rope: Rope) -> None:
        super().__init__()
        self.rope = rope
        self._stated_dim = int(head_dim * rope.partial)
        self.rotary_dim = self._stated_dim + self._stated_dim % 2  # dimensions turn in pairs
        self.factor = 1.0
        self.register_buffer("inv_freq", torch.empty(self.rotary_dim // 2), persistent=False)
        if not self.inv_freq.is_meta:
            self.reset_buffers()

    def reset_buffers(self, device: str | torch.device | None = None) -> None:
        """Make the frequencies anew on `device`: a model is put together without memory first."""
        self.inv_freq, self.factor = self.rope.frequencies(self._stated_dim, device)  # [rotary_dim / 2]

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """positions `[tokens]` to cos and sin `[tokens, 1, rotary_dim / 2]`."""
        angles = positions.float()[:, None] * self.inv_freq  # [tokens, rotary_dim / 2]
        cos, sin = angles.cos() * self.factor, angles.sin() * self.factor
        return Angles(cos.to(dtype)[:, None], sin.to(dtype)[:, None])

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        """x `[tokens, heads, dim]`, turned."""
        return rotate(x, x, angles)[0]
