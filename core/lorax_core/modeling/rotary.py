"""Rotary position embedding.

Decides the angle of each position. Angles are computed in float32 for the positions of each batch and shared by all layers;
nothing is cached by length, so no position is out of range. Knows nothing of how heads are rotated; `kernels.elementwise` does.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from lorax_core.kernels.elementwise import Angles
from lorax_core.modeling.rope import Rope


class RotaryEmbedding(nn.Module):
    """Angles for the first `rotary_dim` dimensions of each head, `rope.partial` of it.

    Raises ValueError where no dimension of a head would rotate.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int, rope: Rope) -> None:
        super().__init__()
        self.rope = rope
        self._stated_dim = int(head_dim * rope.partial)
        # An odd number is rounded up, as arange(0, dim, 2) gives the last pair too; exponents still divide by the stated one.
        self.rotary_dim = self._stated_dim + self._stated_dim % 2  # dimensions rotate in pairs
        if not 0 <= self.rotary_dim <= head_dim:
            raise ValueError(
                f"{self.rotary_dim} rotary dimensions do not fit a head of {head_dim}: pairs need an even head"
            )
        self.factor = 1.0
        # Not persistent: checkpoints that store frequencies may have rounded them to 16 bit.
        self.register_buffer("inv_freq", torch.empty(self.rotary_dim // 2), persistent=False)
        if not self.inv_freq.is_meta:
            self.reset_buffers()

    @property
    def key(self) -> Hashable:
        """Equal keys mean equal angles, so layers share them."""
        return self.rope, self._stated_dim

    def reset_buffers(self, device: str | torch.device | None = None) -> None:
        """Make the frequencies again on `device`: a model is put together without memory first."""
        self.inv_freq, self.factor = self.rope.frequencies(self._stated_dim, device)  # [rotary_dim / 2]

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """Positions `[tokens]` to cos and sin, each `[tokens, 1, rotary_dim / 2]`."""
        # In float32 even for 16-bit models: bfloat16 has 8 bits, so positions above 256 would share angles.
        angles = positions.float()[:, None] * self.inv_freq  # [tokens, rotary_dim / 2]
        cos, sin = angles.cos() * self.factor, angles.sin() * self.factor
        return Angles(cos.to(dtype)[:, None], sin.to(dtype)[:, None])
