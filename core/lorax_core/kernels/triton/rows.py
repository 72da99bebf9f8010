"""The kernels of `TritonElementwise`: one program a row, or a part of one.

Decides the arithmetic, in float32 with the rounding points of `kernels.elementwise`. Offsets of rows and slots are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normalise_rows(
    x: tl.tensor,
    more: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    x_row: tl.tensor,
    more_row: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    CENTRE: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    OFFSET: tl.constexpr,
) -> None:
    """`total = x + more` and `out`, its norm: a layer norm with CENTRE, else that of the root mean square."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    mask = n < N
    dtype: tl.constexpr = x.dtype.element_ty
    v = tl.load(x + row * x_row + n, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(more + row * more_row + n, mask=mask, other=0.0).to(tl.float32)
        rounded = v.to(dtype)  # the next residual; the norm is of the rounded sum, as in the readable form
        tl.store(total + row * N + n, rounded, mask=mask)
        v = rounded.to(tl.float32)
    if CENTRE:
        v = tl.where(mask, v - tl.sum(v, axis=0) / N, 0.0)
    v = v * (1.0 / tl.sqrt_rn(tl.sum(v * v, axis=0) / N + eps))
    if CENTRE:
        if WEIGHT:
            v *= tl.load(weight + n, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            v += tl.load(bias + n, mask=mask, other=0.0).to(tl.float32)
    else:
        w = tl.load(weight + n, mask=mask, other=0.0).to(tl.float32)
        # Gemma multiplies before it rounds, Llama after.
        v = v * (offset + w) if OFFSET else v.to(dtype).to(tl.float32) * w
    tl.store(out + row * N + n, v.to(dtype), mask=mask)


@triton.jit
def gate_rows(
    gate_up: tl.tensor,
    out: tl.tensor,
    row_stride: tl.tensor,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ACT: tl.constexpr,
) -> None:
    """`act(gate) * up`, where a row is N numbers of the gate and then N of up."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    dtype: tl.constexpr = gate_up.dtype.element_ty
    at = gate_up + row * row_stride + n
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + N, mask=mask, other=0.0).to(tl.float32)
    if ACT == 0:
        gate = gate / (1.0 + tl.exp(-gate))
    elif ACT == 1:
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACT == 2:
        # (1 + tanh(z)) / 2 is 1 / (1 + exp(-2z)), which loses no digits where the tanh is near -1.
        gate = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    else:
        gate = tl.where(gate < 0.0, 0.0, gate)  # keeps NaN
    tl.store(out + row * N + n, (gate.to(dtype).to(tl.float32) * up).to(dtype), mask=mask)


@triton.jit
def turn_rows(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    slots: tl.tensor,
    q_out: tl.tensor,
    k_out: tl.tensor,
    v_out: tl.tensor,
    q_row: tl.tensor,
    k_row: tl.tensor,
    v_row: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    Q_GROUPS: tl.constexpr,
    KV_GROUPS: tl.constexpr,
    STORE: tl.constexpr,
) -> None:
    """Heads of q turned, of k turned and of v as they are; with STORE k and v go to the row's slot, below 0 nowhere."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    to = row
    if STORE:
        to = tl.load(slots + row).to(tl.int64)
    if group < Q_GROUPS:
        h = group * BLOCK_H + tl.arange(0, BLOCK_H)
        at = row * HEADS * DIM
        _turn(q + row * q_row, q_out + at, cos, sin, row, h, HEADS, DIM, HALF, BLOCK_HALF, BLOCK_REST)
    elif to >= 0:
        at = to * KV_HEADS * DIM
        if group < Q_GROUPS + KV_GROUPS:
            h = (group - Q_GROUPS) * BLOCK_H + tl.arange(0, BLOCK_H)
            _turn(k + row * k_row, k_out + at, cos, sin, row, h, KV_HEADS, DIM, HALF, BLOCK_HALF, BLOCK_REST)
        else:
            h = (group - Q_GROUPS - KV_GROUPS) * BLOCK_H + tl.arange(0, BLOCK_H)
            d = tl.arange(0, BLOCK_DIM)
            mask = (h < KV_HEADS)[:, None] & (d < DIM)[None, :]
            numbers = h[:, None] * DIM + d[None, :]
            rows = tl.load(v + row * v_row + numbers, mask=mask, other=0.0)
            tl.store(v_out + at + numbers, _cast(rows, v_out.dtype.element_ty), mask=mask)


@triton.jit
def _turn(
    x: tl.tensor,
    out: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    row: tl.tensor,
    h: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
) -> None:
    dtype: tl.constexpr = x.dtype.element_ty
    if HALF > 0:
        i = tl.arange(0, BLOCK_HALF)
        mask = (h < HEADS)[:, None] & (i < HALF)[None, :]
        at = h[:, None] * DIM + i[None, :]
        c = tl.load(cos + row * HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
        s = tl.load(sin + row * HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
        first = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x + at + HALF, mask=mask, other=0.0).to(tl.float32)
        # Each product is rounded, then the sum: so does the readable form.
        turned = (first * c).to(dtype).to(tl.float32) - (second * s).to(dtype).to(tl.float32)
        tl.store(out + at, _cast(turned.to(dtype), out.dtype.element_ty), mask=mask)
        turned = (second * c).to(dtype).to(tl.float32) + (first * s).to(dtype).to(tl.float32)
        tl.store(out + at + HALF, _cast(turned.to(dtype), out.dtype.element_ty), mask=mask)
    if BLOCK_REST > 0:
        i = tl.arange(0, BLOCK_REST)
        mask = (h < HEADS)[:, None] & (i < DIM - 2 * HALF)[None, :]
        at = h[:, None] * DIM + 2 * HALF + i[None, :]
        tl.store(out + at, _cast(tl.load(x + at, mask=mask, other=0.0), out.dtype.element_ty), mask=mask)


@triton.jit
def _cast(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    return x if x.dtype == dtype else x.to(tl.float32).to(dtype)
