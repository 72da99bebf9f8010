"""Attention in plain torch: the readable oracle, and the default on CPU.

Decides how each sequence's keys are gathered and masked. Every other backend is tested against this one. Forms were chosen
by measurement on CPU: one call a sequence beats padded and masked ones, and a decoding row folds its group of query heads
into rows of one key head, because torch's own grouped-query path is slow for a single row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lorax_core.attention.base import AttentionBackend, AttentionSpec

if TYPE_CHECKING:
    from lorax_core.modeling.attention import Attention
    from lorax_core.modeling.batch import Batch

# Up to this many keys, decoding rows are gathered into one padded call; beyond it padding costs more than calls do.
_GATHER_KEYS = 512


@dataclass(slots=True)
class _Piece:
    """One sequence's share of the step: rows `start:stop` see `past + (stop - start)` keys on `pages`."""

    start: int
    stop: int
    past: int
    pages: Tensor  # [pages of the sequence] int64


@dataclass(slots=True)
class _Decode:
    """Rows that decode one token each, gathered into one call."""

    rows: Tensor  # [n] int64
    pages: Tensor  # [n, most pages] int64, filled up with page 0
    lengths: Tensor  # [n] int64: keys of each row
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # window -> [n, 1, 1, keys] bool


@dataclass(slots=True)
class _Plan:
    pieces: list[_Piece]
    decode: _Decode | None
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)  # (rows, past, window) -> bool


class TorchBackend(AttentionBackend):
    """Scaled dot-product attention of torch, one call a sequence."""

    name = "torch"

    @classmethod
    def is_available(cls) -> tuple[bool, str]:
        return True, "part of torch"

    def supports(self, spec: AttentionSpec, page_size: int, dtype: torch.dtype, device: str) -> str | None:
        return None

    def plan(self, batch: Batch, specs: Sequence[AttentionSpec]) -> None:
        if not any(spec.causal for spec in specs):
            return
        device = batch.input_ids.device
        starts = batch.starts
        pieces, single = [], []
        for i, length in enumerate(batch.lengths):
            short = batch.cached[i] + length <= _GATHER_KEYS
            if length == 1 and short:
                single.append(i)
            else:
                pages = torch.tensor(batch.pages[i], dtype=torch.int64, device=device)
                pieces.append(_Piece(starts[i], starts[i + 1], batch.cached[i], pages))
        batch.plan = _Plan(pieces, _gather_plan(batch, single, starts, device) if single else None)

    def attend(self, q: Tensor, layer: Attention, batch: Batch) -> Tensor:
        assert batch.kv is not None
        plan: _Plan = batch.plan
        out = torch.empty_like(q)  # [tokens, heads, dim]
        if plan.decode is not None:
            k, v = batch.kv.gather(layer.index, plan.decode.pages, q.dtype)  # [n, most pages, page, kv_heads, dim]
            out[plan.decode.rows] = _decode_rows(q[plan.decode.rows], k, v, plan.decode, layer.spec)
        for piece in plan.pieces:
            rows = slice(piece.start, piece.stop)
            total = piece.past + piece.stop - piece.start
            # Pages that lie wholly behind the window may have been given back: they are not even read.
            page_size = batch.kv.page_size
            first = 0 if layer.spec.window is None else max(0, piece.past + 1 - layer.spec.window) // page_size
            k, v = batch.kv.gather(layer.index, piece.pages[first:], q.dtype)
            seen = total - first * page_size
            k, v = k.flatten(0, 1)[:seen], v.flatten(0, 1)[:seen]  # [keys, kv_heads, dim]
            out[rows] = _extend(q[rows], k, v, piece.past - first * page_size, layer.spec, plan)
        return out

    def encode(self, q: Tensor, k: Tensor, v: Tensor, layer: Attention, batch: Batch) -> Tensor:
        starts = batch.starts
        out = torch.empty_like(q)  # [tokens, heads, dim]
        for start, stop in pairwise(starts):
            rows = slice(start, stop)
            mask = _band(stop - start, 0, layer.spec.window, False, q.device) if layer.spec.window else None
            out[rows] = _attention(q[rows], k[rows], v[rows], mask, False, layer.spec)
        return out


def _gather_plan(batch: Batch, single: list[int], starts: tuple[int, ...], device: torch.device) -> _Decode:
    most = max(len(batch.pages[i]) for i in single)
    pages = [list(batch.pages[i]) + [0] * (most - len(batch.pages[i])) for i in single]
    return _Decode(
        rows=torch.tensor([starts[i] for i in single], dtype=torch.int64, device=device),
        pages=torch.tensor(pages, dtype=torch.int64, device=device),
        lengths=torch.tensor([batch.cached[i] + 1 for i in single], dtype=torch.int64, device=device),
    )


def _decode_rows(q: Tensor, keys: Tensor, values: Tensor, decode: _Decode, spec: AttentionSpec) -> Tensor:
    """One row for each sequence: q `[n, heads, dim]` over its own pages."""
    n, heads, dim = q.shape
    k = keys.flatten(1, 2).transpose(1, 2)  # [n, kv_heads, keys, dim]
    v = values.flatten(1, 2).transpose(1, 2)
    mask = decode.masks.get(spec.window)
    if mask is None:
        at = torch.arange(k.shape[2], device=q.device)
        visible = at < decode.lengths[:, None]  # [n, keys]
        if spec.window is not None:
            visible &= at >= decode.lengths[:, None] - spec.window
        mask = decode.masks[spec.window] = visible[:, None, None]
    grouped = q.view(n, spec.kv_heads, heads // spec.kv_heads, dim)  # query heads of one key head are rows of it
    return _sdpa(grouped, k, v, mask, False, spec, gqa=False).reshape(n, heads, dim)


def _extend(q: Tensor, k: Tensor, v: Tensor, past: int, spec: AttentionSpec, plan: _Plan) -> Tensor:
    """Rows that follow `past` cached tokens of the same sequence."""
    rows = q.shape[0]
    if rows == 1:
        first = 0 if spec.window is None else max(0, k.shape[0] - spec.window)
        grouped = q.view(1, spec.kv_heads, -1, spec.head_dim)  # [1, kv_heads, heads / kv_heads, dim]
        k, v = (t[first:].transpose(0, 1)[None] for t in (k, v))  # [1, kv_heads, keys, dim]
        return _sdpa(grouped, k, v, None, False, spec, gqa=False).reshape(q.shape)
    if past == 0 and (spec.window is None or spec.window >= rows):
        return _attention(q, k, v, None, True, spec)
    key = (rows, past, spec.window)
    if key not in plan.masks:
        plan.masks[key] = _band(rows, past, spec.window, True, q.device)
    return _attention(q, k, v, plan.masks[key], False, spec)


def _band(rows: int, past: int, window: int | None, causal: bool, device: torch.device) -> Tensor:
    """Which keys each row sees: `[rows, past + rows]` bool."""
    at = torch.arange(past, past + rows, device=device)[:, None]
    keys = torch.arange(past + rows, device=device)
    visible = keys <= at if causal else torch.ones(rows, past + rows, dtype=torch.bool, device=device)
    if window is not None:
        visible = visible & (keys > at - window)
        if not causal:
            visible = visible & (keys < at + window)
    return visible


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, spec: AttentionSpec) -> Tensor:
    """q `[rows, heads, dim]` over k and v `[keys, kv_heads, dim]`."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # [1, heads, rows, dim]
    return _sdpa(q, k, v, mask, causal, spec, gqa=spec.heads != spec.kv_heads)[0].transpose(0, 1)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, spec: AttentionSpec, *, gqa: bool
) -> Tensor:
    if spec.soft_cap is None:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)
    if gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5  # [.., rows, keys]
    scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v.float()).to(q.dtype)
