"""Attention in plain torch: the readable oracle, and the default on CPU.

Decides how each sequence's keys are gathered and masked. Every other backend is tested against this one. Forms were chosen
by measurement on CPU: one call a sequence beats padded and masked ones, and a decoding row folds its group of query heads
into rows of one key head, because torch's own grouped-query path is slow for a single row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lorax_core.attention.base import (
    AttentionBackend,
    AttentionLayer,
    AttentionRows,
    AttentionSpec,
    CacheLayout,
    KVCache,
    PagedStep,
    StepAttention,
)

PAGE_SIZE = 16
# Texts are cut into so many rows where a window ends, and each block reads the keys near it alone.
_BLOCK_ROWS = 128
# Up to this many keys, decoding rows are gathered into one padded call; beyond it padding costs more than calls do.
_GATHER_KEYS = 512


@dataclass(frozen=True, slots=True)
class _Extend:
    """Rows of one sequence that follow `past` cached keys, as layers of one window see it.

    Pages wholly behind the window are left out: they may hold another sequence by now. `keys` are those on `pages`.
    """

    rows: slice
    pages: Tensor  # [pages] int32
    keys: int
    mask: Tensor | None  # [rows, keys] bool; None where a causal or no mask does
    causal: bool


@dataclass(frozen=True, slots=True)
class _Decode:
    """Rows of sequences that decode one token each, gathered into one padded call."""

    rows: Tensor | slice  # [n] int64, or all rows in a run
    pages: Tensor  # [n, most pages] int32, filled up with page 0
    masks: dict[int | None, Tensor]  # window -> [n, 1, 1, keys] bool


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of a bidirectional text, and the keys of it that any of them sees."""

    rows: slice
    keys: slice
    mask: Tensor | None  # [rows, keys] bool; None where each row sees all of the keys


class TorchStep(PagedStep):
    """One step of `TorchBackend`: decoding rows in one call, every other sequence in a call of its own."""

    def __init__(
        self,
        cache: KVCache | None,
        slots: Tensor | None,
        decode: _Decode | None,
        extends: dict[int | None, list[_Extend]],
        texts: dict[int | None, list[_Block]],
    ) -> None:
        super().__init__(cache, slots)
        self._decode = decode
        self._extends = extends  # by window
        self._texts = texts  # bidirectional, by window

    def attend(self, layer: AttentionLayer, q: Tensor) -> Tensor:
        spec, decode = layer.spec, self._decode
        out = torch.empty_like(q)  # [tokens, heads, dim]
        if decode is not None:
            k, v = self.cache.gather(layer.index, decode.pages, q.dtype)  # [n, most pages, page, kv_heads, dim]
            out[decode.rows] = _decode_rows(q[decode.rows], k, v, decode.masks[spec.window], spec)
        for part in self._extends[spec.window]:
            k, v = self.cache.gather(layer.index, part.pages, q.dtype)
            k, v = k.flatten(0, 1)[: part.keys], v.flatten(0, 1)[: part.keys]  # [keys, kv_heads, dim]
            out[part.rows] = _extend(q[part.rows], k, v, part, spec)
        return out

    def encode(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)  # [tokens, heads, dim]
        for part in self._texts[layer.spec.window]:
            out[part.rows] = _attention(q[part.rows], k[part.keys], v[part.keys], part.mask, False, layer.spec)
        return out


class TorchBackend(AttentionBackend):
    """Scaled dot-product attention of torch. Takes every layer, dtype, device and page size."""

    name = "torch"

    def __init__(self) -> None:
        self._cache: KVCache | None = None
        self._causal: tuple[int | None, ...] = ()  # the distinct windows of causal layers
        self._bidirectional: tuple[int | None, ...] = ()

    @classmethod
    def is_available(cls) -> tuple[bool, str]:
        return True, "part of torch"

    def layout(
        self,
        specs: Sequence[AttentionSpec],
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        device: str,
        page_size: int | None = None,
    ) -> CacheLayout | str:
        return CacheLayout(page_size or PAGE_SIZE, kv_dtype)

    def bind(self, specs: Sequence[AttentionSpec], dtype: torch.dtype, cache: KVCache | None) -> None:
        self._cache = cache
        self._causal = tuple(dict.fromkeys(spec.window for spec in specs if spec.causal))
        self._bidirectional = tuple(dict.fromkeys(spec.window for spec in specs if not spec.causal))

    def plan(self, rows: AttentionRows) -> StepAttention:
        return self.plan_some(rows, range(len(rows.kv_lengths.host)))

    def plan_some(self, rows: AttentionRows, sequences: Sequence[int]) -> StepAttention:
        """A plan that computes these sequences of a step alone, given in order; rows of others are left as they are."""
        starts: list[int] = rows.query_starts.host.tolist()
        every = list(pairwise(starts))
        runs = [every[at] for at in sequences]
        device = rows.query_starts.device.device
        texts = {window: _blocks(runs, window, device) for window in self._bidirectional}
        if not self._causal:
            return TorchStep(None, None, None, {}, texts)
        assert self._cache is not None, "bind() comes before plan()"
        assert rows.page_table is not None, "a causal model's rows have no page table"
        lengths: list[int] = rows.kv_lengths.host.tolist()
        single = [i for i in sequences if every[i][1] - every[i][0] == 1 and lengths[i] <= _GATHER_KEYS]
        others = sorted(set(sequences) - set(single))
        table, size = rows.page_table.device, self._cache.page_size
        decode = _decode_plan(rows, table, single, starts, lengths, size, self._causal) if single else None
        extends = {
            window: [_extend_plan(table[i], every[i], lengths[i], size, window) for i in others]
            for window in self._causal
        }
        return TorchStep(self._cache, rows.slots, decode, extends, texts)


def _blocks(runs: Sequence[tuple[int, int]], window: int | None, device: torch.device) -> list[_Block]:
    """Whole texts where a window ends nowhere in them; else blocks of rows with the keys near them."""
    found: list[_Block] = []
    masks: dict[tuple[int, int, int], Tensor] = {}  # blocks inside a text have the same
    for start, stop in runs:
        if window is None or stop - start <= window:
            found.append(_Block(slice(start, stop), slice(start, stop), None))
            continue
        for first in range(start, stop, _BLOCK_ROWS):
            last = min(first + _BLOCK_ROWS, stop)
            keys = slice(max(first + 1 - window, start), min(last + window - 1, stop))
            shape = last - first, first - keys.start, keys.stop - keys.start
            if shape not in masks:
                at = torch.arange(first, last, device=device)[:, None]
                masks[shape] = (torch.arange(keys.start, keys.stop, device=device) - at).abs() < window
            found.append(_Block(slice(first, last), keys, masks[shape]))
    return found


def _decode_plan(
    rows: AttentionRows,
    table: Tensor,
    single: list[int],
    starts: list[int],
    lengths: list[int],
    page_size: int,
    windows: Sequence[int | None],
) -> _Decode:
    most = -(-max(lengths[i] for i in single) // page_size)
    keys = torch.arange(most * page_size, device=table.device)
    first, count = starts[single[0]], len(single)
    # A run of rows, the usual case, is a view; anything else is gathered.
    together = single[-1] - single[0] == count - 1
    at = slice(single[0], single[0] + count) if together else torch.tensor(single, device=table.device)
    chosen = slice(first, first + count) if together else rows.query_starts.device[:-1][at].long()
    ends = rows.kv_lengths.device[at, None]  # [n, 1]
    masks: dict[int | None, Tensor] = {}
    for window in windows:
        visible = keys < ends  # [n, keys]
        if window is not None:
            visible &= keys >= ends - window
        masks[window] = visible[:, None, None]
    return _Decode(chosen, table[at, :most], masks)


def _extend_plan(pages: Tensor, run: tuple[int, int], length: int, page_size: int, window: int | None) -> _Extend:
    start, stop = run
    rows = stop - start
    past = length - rows
    # Window of the first row: its oldest visible key is at past + 1 - window.
    behind = 0 if window is None else max(0, past + 1 - window) // page_size
    past, keys = past - behind * page_size, length - behind * page_size
    # SDPA's is_causal aligns the mask at the top left, which is right only without past keys.
    causal = past == 0 and (window is None or window >= rows)
    mask = None if causal or rows == 1 else _band(rows, past, window, pages.device)
    return _Extend(slice(start, stop), pages[behind : -(-length // page_size)], keys, mask, causal)


def _decode_rows(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, spec: AttentionSpec) -> Tensor:
    """One row for each sequence: q `[n, heads, dim]` over its own pages."""
    n, heads, dim = q.shape
    k = keys.flatten(1, 2).transpose(1, 2)  # [n, kv_heads, keys, dim]
    v = values.flatten(1, 2).transpose(1, 2)
    grouped = q.reshape(n, spec.kv_heads, heads // spec.kv_heads, dim)  # query heads of one key head are rows of it
    return _sdpa(grouped, k, v, mask, False, spec, gqa=False).reshape(n, heads, dim)


def _extend(q: Tensor, k: Tensor, v: Tensor, part: _Extend, spec: AttentionSpec) -> Tensor:
    """Rows that follow cached keys of the same sequence."""
    if q.shape[0] == 1:
        first = 0 if spec.window is None else max(0, k.shape[0] - spec.window)
        grouped = q.reshape(1, spec.kv_heads, -1, spec.head_dim)  # [1, kv_heads, heads / kv_heads, dim]
        k, v = (t[first:].transpose(0, 1)[None] for t in (k, v))  # [1, kv_heads, keys, dim]
        return _sdpa(grouped, k, v, None, False, spec, gqa=False).reshape(q.shape)
    return _attention(q, k, v, part.mask, part.causal, spec)


def _band(rows: int, past: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys each row of a causal layer sees: `[rows, past + rows]` bool."""
    at = torch.arange(past, past + rows, device=device)[:, None]
    keys = torch.arange(past + rows, device=device)
    visible = keys <= at
    return visible if window is None else visible & (keys > at - window)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, spec: AttentionSpec) -> Tensor:
    """q `[rows, heads, dim]` over k and v `[keys, kv_heads, dim]`."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # [1, heads, rows, dim]
    return _sdpa(q, k, v, mask, causal, spec, gqa=spec.heads != spec.kv_heads)[0].transpose(0, 1)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, spec: AttentionSpec, *, gqa: bool
) -> Tensor:
    if spec.soft_cap is None:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)
    # matmul does not broadcast over groups of heads, so key heads are repeated.
    if gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    # float32, as scores and softmax are inside fused kernels.
    scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5  # [.., rows, keys]
    scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v.float()).to(q.dtype)
