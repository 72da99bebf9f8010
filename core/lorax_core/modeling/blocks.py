"""Attention and feed-forward blocks that architectures share.

Decides the order of projections, rotation, attention and activations, through the attention and elementwise seams. Modules are
named as in transformers' Llama; an architecture with other names renames them in its `WeightMap`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Required, TypedDict, Unpack

from torch import Tensor, nn

from lorax_core.kernels.elementwise import HasElementwise
from lorax_core.modeling.activation import get_activation
from lorax_core.modeling.attention import Attention
from lorax_core.modeling.batch import Batch
from lorax_core.modeling.linear import GateUpLinear, Linear, QKVLinear
from lorax_core.modeling.norm import Norm
from lorax_core.modeling.rotary import RotaryEmbedding


class Block(nn.Module):
    """A module over rows: x `[tokens, hidden]` and the batch to the same shape."""

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, batch: Batch) -> Tensor: ...


class AttentionOptions(TypedDict, total=False):
    """What a subclass of `SelfAttention` passes on: its options by name, with their defaults there."""

    causal: Required[bool]
    bias: bool
    out_bias: bool | None
    scale: float | None
    window: int | None
    soft_cap: float | None
    qk_norm: Callable[[int], Norm] | None
    qk_norm_whole: bool


class SelfAttention(Block):
    """Projections to q, k and v, attention, and the projection back.

    `kv_heads` None is as many as heads, `head_dim` None is `hidden / heads`; `window` counts the keys that a query sees, itself
    included, and without `causal` as many on the other side. `qk_norm` makes the norms of queries and keys from their size:
    that of one head, or with `qk_norm_whole` of all.

    Raises ValueError for sizes that do not fit each other.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        causal: bool,
        bias: bool = True,
        out_bias: bool | None = None,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        qk_norm: Callable[[int], Norm] | None = None,
        qk_norm_whole: bool = False,
    ) -> None:
        super().__init__()
        if head_dim is None and hidden % heads:
            raise ValueError(
                f"a width of {hidden} is not a multiple of {heads} heads; give head_dim where heads have their own"
            )
        # Qwen3 or Gemma state a head_dim for which heads * dim != hidden, so o_proj takes heads * dim and not hidden.
        dim = hidden // heads if head_dim is None else head_dim
        kv_heads = kv_heads or heads
        self.qkv_proj = QKVLinear(hidden, heads, kv_heads, dim, bias)
        self.qk_norm_whole = qk_norm_whole
        q_size, k_size = (heads * dim, kv_heads * dim) if qk_norm_whole else (dim, dim)
        self.q_norm = None if qk_norm is None else qk_norm(q_size)
        self.k_norm = None if qk_norm is None else qk_norm(k_size)
        self.attention = Attention(heads, kv_heads, dim, causal=causal, scale=scale, window=window, soft_cap=soft_cap)
        # Qwen2 has biases on q, k and v and none here, so `out_bias` is apart from `bias`.
        self.o_proj = Linear(heads * dim, hidden, bias if out_bias is None else out_bias)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        q, k, v = self.qkv_proj.project(x, batch)  # [tokens, heads | kv_heads, dim]
        # Before the rotation: weights of a norm differ by dimension, so the order matters.
        q, k = self._normed(self.q_norm, q, batch), self._normed(self.k_norm, k, batch)
        return self.o_proj(self.attend(q, k, v, batch), batch)  # [tokens, hidden]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """q `[tokens, heads, dim]`, k and v `[tokens, kv_heads, dim]` to `[tokens, heads * dim]`."""
        return self.attention(q, k, v, batch)

    def _normed(self, norm: Norm | None, x: Tensor, batch: Batch) -> Tensor:
        if norm is None:
            return x
        return norm(x.flatten(1), batch).view(x.shape) if self.qk_norm_whole else norm(x, batch)


class RotaryAttention(SelfAttention):
    """Self-attention whose queries and keys are rotated by their position. Layers may share one `rotary`.

    The options are those of `SelfAttention`.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        rotary: RotaryEmbedding,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(hidden, heads, kv_heads, head_dim, **options)
        dim = self.qkv_proj.head_dim
        if rotary.rotary_dim > dim:
            raise ValueError(f"{rotary.rotary_dim} rotary dimensions do not fit a head of {dim}")
        self.rotary = rotary

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        # Angles are passed down instead of applied here, so that a backend may fuse the rotation with its cache write.
        # k is cached rotated, which is why no type of rope may change frequencies later (`Rope.max_tokens`).
        return self.attention(q, k, v, batch, batch.angles(self.rotary, q.dtype))


class MLP(Block, HasElementwise):
    """`down(act(up(x)))`; `act` is an activation's name in a `config.json`."""

    def __init__(self, hidden: int, intermediate: int, act: str, bias: bool = True) -> None:
        super().__init__()
        self.up_proj = Linear(hidden, intermediate, bias)
        self.act = get_activation(act)
        self.down_proj = Linear(intermediate, hidden, bias)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        return self.down_proj(self.elementwise.act(self.up_proj(x, batch), self.act), batch)


class GatedMLP(Block, HasElementwise):
    """`down(act(gate(x)) * up(x))`."""

    def __init__(self, hidden: int, intermediate: int, act: str, bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = GateUpLinear(hidden, intermediate, bias)
        self.act = get_activation(act)
        self.down_proj = Linear(intermediate, hidden, bias)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        return self.down_proj(self.elementwise.gated_act(self.gate_up_proj(x, batch), self.act), batch)
