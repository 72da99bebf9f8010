"""What blocks do to rows beside matrix products: rotating, normalising, gating, activating.

Decides the arithmetic, one readable method each, with the order of operations of transformers, and the seam at which compiled
forms take their place. Knows nothing of layers, adapters or batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Angles(NamedTuple):
    """Cosine and sine of rotary positions, each `[tokens, 1, rotary_dim / 2]`."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation function with a name, by which a compiled form knows it: equal names are equal functions."""

    name: str
    function: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


class Elementwise:
    """The readable form, in plain torch, for every device, dtype and shape.

    Methods are pure but for the cache that `rotate_and_store` writes. A compiled form is a subclass that overrides what it
    computes and calls these for what it does not; it has the same rounding points, so in 16 bit it gives the same numbers
    but where a sum in another order rounds the other way.
    """

    name: ClassVar[str] = "torch"

    def rotate(self, q: Tensor, k: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """q `[tokens, heads, dim]` and k `[tokens, kv_heads, dim]` with the first `rotary_dim` of each head rotated.

        Half-split: dimension i of the first half and dimension i of the second half are one pair.
        """
        return _rotated(q, angles), _rotated(k, angles)

    def rotate_and_store(
        self, q: Tensor, k: Tensor, v: Tensor, angles: Angles | None, k_cache: Tensor, v_cache: Tensor, slots: Tensor
    ) -> Tensor:
        """Rotate q and k, store k and v in caches `[pages, page, kv_heads, dim]`; gives q.

        Row i goes to token `slots[i]` of the pages end to end, none below 0; numbers are stored in the dtype of the cache.
        """
        if angles is not None:
            q, k = self.rotate(q, k, angles)
        for cache, rows in ((k_cache, k), (v_cache, v)):
            # view, not flatten: of a cache that cannot be viewed so, flatten would fill a copy.
            cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, rows.to(cache.dtype))
        return q

    def layer_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension of x `[rows, size]`."""
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The `layer_norm` of `x + residual`, and the sum itself, which is the next residual."""
        total = x + residual  # [rows, size]
        return self.layer_norm(total, weight, bias, eps), total

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """`x / sqrt(mean(x^2) + eps) * (offset + weight)` over the last dimension of x; statistics in float32."""
        normed = F.rms_norm(x.float(), x.shape[-1:], None, eps)  # [rows, size]
        if offset:
            # transformers' Gemma multiplies before it rounds, its Llama after; 16 bit shows the difference.
            return (normed * (offset + weight.float())).to(x.dtype)
        return normed.to(x.dtype) * weight

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The `rms_norm` of `x + residual`, and the sum itself, which is the next residual."""
        total = x + residual  # [rows, size]
        return self.rms_norm(total, weight, eps, offset), total

    def gated_act(self, gate_up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        """`act(gate) * up` of gate_up `[rows, 2 * intermediate]`, whose first half is the gate.

        A compiled form knows `act` by its name, an `Activation`'s; others are computed here.
        """
        gate, up = gate_up.chunk(2, dim=-1)  # [rows, intermediate] each
        return act(gate) * up

    def act(self, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        """`act(x)` of x `[rows, size]`; what `gated_act` says of `act` holds here too."""
        return act(x)


READABLE = Elementwise()
"""What layers compute with unless they are given another form."""


class HasElementwise:
    """A layer that computes with an `Elementwise`; `Model.use_elementwise` gives all layers of a model another."""

    elementwise: Elementwise = READABLE


def _rotated(x: Tensor, angles: Angles) -> Tensor:
    cos, sin = angles  # [tokens, 1, rotary_dim / 2]; the 1 stands for the heads
    half = cos.shape[-1]
    # `rest` is empty unless rotary_dim is less than the head's (GPT-NeoX's rotary_pct).
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
