"""Rotary position embedding.

Decides the angle of a position and how it turns queries and keys. Computed in float32 for the positions of each batch and
shared by all layers; nothing is cached by length, so no position is out of range.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Turns the first `rotary_dim` numbers of each head, half-split (the second half is the first one's partner)."""

    inv_freq: Tensor

    def __init__(self, rotary_dim: int, base: float) -> None:
        super().__init__()
        self.rotary_dim = rotary_dim
        self.base = base
        self.register_buffer("inv_freq", torch.empty(rotary_dim // 2), persistent=False)
        self.reset_buffers()

    def reset_buffers(self, device: str | torch.device | None = None) -> None:
        """Make the frequencies anew on `device`: a model is put together without memory first."""
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device=device) / self.rotary_dim
        self.inv_freq = 1.0 / self.base**exponents  # [rotary_dim / 2]

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions `[tokens]` to cos and sin `[tokens, 1, rotary_dim / 2]`."""
        angles = positions.float()[:, None] * self.inv_freq  # [tokens, rotary_dim / 2]
        return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """x `[tokens, heads, dim]`, turned."""
        cos, sin = angles
        half = self.rotary_dim // 2
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
