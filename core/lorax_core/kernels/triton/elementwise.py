"""`TritonElementwise`: norms, rotation and gating, each in one launch.

Decides how rows are shared out among programs. Rounds where the readable form rounds: in 16 bit, rotation and gating by SiLU
or ReLU are equal to the bit, and norms but where a sum in another order rounds the other way. What a kernel cannot do, the
readable form computes. Knows nothing of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import triton
from torch import Tensor

from lorax_core.kernels.elementwise import Activation, Angles, Elementwise
from lorax_core.kernels.triton.available import DTYPES
from lorax_core.kernels.triton.rows import gate_rows, normalise_rows, turn_rows

ACTS: Final = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
"""Activations that the gate's kernel knows, by the names of `Activation`."""

MAX_WIDTH: Final = 16384
"""A norm holds a whole row in registers; wider rows would be spilled."""

GATE_BLOCK: Final = 1024

# Without this a product and a sum become one rounding in float32, which the readable form does not have.
AS_WRITTEN: Final = {"enable_fp_fusion": False}


class TritonElementwise(Elementwise):
    """One launch a call, on NVIDIA GPUs."""

    name = "triton"

    def rotate(self, q: Tensor, k: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        if not (_same(q, k, *angles) and _heads(q) and _heads(k) and _angles(angles)):
            return super().rotate(q, k, angles)
        q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
        _turn(q, k, k, angles, q_out, k_out, k_out, None)
        return q_out, k_out

    def rotate_and_store(
        self, q: Tensor, k: Tensor, v: Tensor, angles: Angles | None, k_cache: Tensor, v_cache: Tensor, slots: Tensor
    ) -> Tensor:
        caches = k_cache.is_contiguous() and v_cache.is_contiguous() and {k_cache.dtype, v_cache.dtype} <= {*DTYPES}
        rows = _same(q, k, v, *(angles or ())) and _heads(q) and _heads(k) and _heads(v)
        if not (caches and rows and slots.is_contiguous() and (angles is None or _angles(angles))):
            return super().rotate_and_store(q, k, v, angles, k_cache, v_cache, slots)
        q_out = q if angles is None else q.new_empty(q.shape)
        _turn(q, k, v, angles, q_out, k_cache, v_cache, slots)
        return q_out

    def layer_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        if not _normable(x, weight, bias):
            return super().layer_norm(x, weight, bias, eps)
        return _normalise(x, None, weight, bias, eps, None)[0]

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        if not (_normable(x, weight, bias, residual) and x.shape == residual.shape):
            return super().add_layer_norm(x, residual, weight, bias, eps)
        return _normalise(x, residual, weight, bias, eps, None)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        if not _normable(x, weight):
            return super().rms_norm(x, weight, eps, offset)
        return _normalise(x, None, weight, None, eps, offset)[0]

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        if not (_normable(x, weight, residual) and x.shape == residual.shape):
            return super().add_rms_norm(x, residual, weight, eps, offset)
        return _normalise(x, residual, weight, None, eps, offset)

    def gated_act(self, gate_up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        number = ACTS.get(act.name) if isinstance(act, Activation) else None
        if number is None or not _rows(gate_up) or gate_up.dtype not in DTYPES or gate_up.shape[1] % 2:
            return super().gated_act(gate_up, act)
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, size)
        block = min(GATE_BLOCK, triton.next_power_of_2(size))
        gate_rows[(rows, triton.cdiv(size, block))](
            gate_up, out, gate_up.stride(0), N=size, BLOCK=block, ACT=number, **AS_WRITTEN
        )
        return out


def _rows(x: Tensor) -> bool:
    return x.ndim == 2 and x.stride(1) == 1


def _same(first: Tensor, *others: Tensor) -> bool:
    """Whether all are of one dtype that kernels know."""
    return first.dtype in DTYPES and all(other.dtype is first.dtype for other in others)


def _heads(x: Tensor) -> bool:
    """Whether the heads of a row lie end to end, as they do in a view of a fused projection's output."""
    return x.ndim == 3 and x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])


def _angles(angles: Angles) -> bool:
    return angles.cos.shape[-1] > 0 and angles.cos.is_contiguous() and angles.sin.is_contiguous()


def _normable(x: Tensor, *others: Tensor | None) -> bool:
    given = [other for other in others if other is not None]
    return _rows(x) and x.shape[1] <= MAX_WIDTH and _same(x, *given) and all(one.stride(-1) == 1 for one in given)


def _normalise(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float | None
) -> tuple[Tensor, Tensor]:
    """The norm of `x + residual` and the sum; the root mean square's where there is an `offset`, else a layer norm."""
    rows, size = x.shape
    out = x.new_empty(rows, size)
    total = x if residual is None else x.new_empty(rows, size)
    block = triton.next_power_of_2(size)
    more = x if residual is None else residual  # a pointer that is not read
    normalise_rows[(rows,)](
        x, more, weight if weight is not None else x, bias if bias is not None else x, out, total,
        x.stride(0), more.stride(0), float(eps), float(offset or 0.0),
        N=size, BLOCK=block, ADD=residual is not None, CENTRE=offset is None, WEIGHT=weight is not None, BIAS=bias is not None,
        OFFSET=bool(offset), num_warps=min(16, max(4, block // 512)),
    )  # fmt: skip
    return out, total


def _turn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: Angles | None,
    q_out: Tensor,
    k_out: Tensor,
    v_out: Tensor,
    slots: Tensor | None,
) -> None:
    """Rotate q and k and write them, and v with `slots`; without angles, q is left alone."""
    (rows, heads, dim), kv_heads = q.shape, k.shape[1]
    half = 0 if angles is None else angles.cos.shape[-1]
    cos, sin = (q, q) if angles is None else angles  # pointers that are not read
    half_block, rest_block = (triton.next_power_of_2(size) if size else 0 for size in (half, dim - 2 * half))
    widest = max(half_block, rest_block)
    # 1024 numbers a program, or all heads where they are fewer.
    together = min(triton.next_power_of_2(heads), max(1, 1024 // widest))
    q_groups = triton.cdiv(heads, together) if half else 0
    kv_groups = triton.cdiv(kv_heads, together)
    turn_rows[(rows, q_groups + kv_groups * (1 if slots is None else 2))](
        q, k, v, cos, sin, q if slots is None else slots, q_out, k_out, v_out, q.stride(0), k.stride(0), v.stride(0),
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, HALF=half, BLOCK_H=together, BLOCK_HALF=half_block, BLOCK_REST=rest_block,
        BLOCK_DIM=triton.next_power_of_2(dim), Q_GROUPS=q_groups, KV_GROUPS=kv_groups, STORE=slots is not None, **AS_WRITTEN,
    )  # fmt: skip
