"""Products of many low-rank updates, in two launches a site: shrink, `h = x A^T`, and expand, `y += h B`.

Decides how rows, ranks and columns are shared out among programs, and the tables by which programs find their adapter.
Nothing is copied or padded: ranks are ragged, and have no maximum. Knows nothing of adapters or sites but their numbers.

A tile is up to `Form.tile_rows` rows of one adapter: `(first row, rows, address, sites, length)` in int64; address 0 is no
adapter. At the address lies the adapter's table, int64 too: an entry of that length for each of its sites:
`address of A [rank, in]`, `rank` (0: not changed here), `blocks`, and for each block of B
`address of B [ranks, width]`, `first rank`, `ranks`, `column`, `width`; there is room for one at least.

What a program computes is little beside the time in which a load arrives, so loads that do not need each other are made
together: a tile's fields, then an entry's with its first block, then the numbers.

Sums over K are split between programs as planes of h in float32, which expand adds up in their order: no atomics, so the same
step gives the same bits. Which splits there are depends on the site's shape and the step's form alone.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_FIELDS: Final = 5
ENTRY_FIELDS: Final = 3
BLOCK_FIELDS: Final = 5
ALIGNED_TO: Final = 8
"""Columns and widths of blocks are multiples of it in the aligned form, and addresses of 16 bytes: loads are then wide."""

BLOCK_R: Final = 16  # tl.dot takes no less
BLOCK_K: Final = 128
BLOCK_N: Final = 128


class Form(NamedTuple):
    """How a step's rows are cut up: rows of a tile, and into how many planes sums over K may be split."""

    tile_rows: int
    most_splits: int

    def splits(self, features: int) -> int:
        """The planes of a site with so many input features: a power of two, each of at least 512 features."""
        splits = 1
        while splits < self.most_splits and features >= 1024 * splits:
            splits *= 2
        return splits


# No tile of more than 32 rows: from 64 on, products on sm_90 become wgmma, where others saw NaN from such kernels.
FEW_ROWS: Final = Form(tile_rows=16, most_splits=8)
MANY_ROWS: Final = Form(tile_rows=32, most_splits=1)
FEW: Final = 256
"""Up to so many rows a step is short of programs, and splits K; beyond it splits would only cost memory traffic."""


def form(rows: int) -> Form:
    """The form for a step of so many rows."""
    return FEW_ROWS if rows <= FEW else MANY_ROWS


class Launch(NamedTuple):
    """What both launches of a site share: tiles `[tiles, 5]`, scratch `[planes * rows * ranks]` float32, and the form."""

    tiles: Tensor
    scratch: Tensor
    rows: int
    ranks: int
    form: Form

    def add(self, site: int, rank: int, x: Tensor, y: Tensor, *, aligned: bool) -> None:
        """Add the products at a site, of rank `rank` at most, to y `[rows, out]` for x `[rows, in]`, rows contiguous."""
        self.shrink(site, rank, x, aligned=aligned)
        self.expand(site, x, y, aligned=aligned)

    def shrink(self, site: int, rank: int, x: Tensor, *, aligned: bool) -> None:
        """The first launch, which needs no y."""
        splits = self.form.splits(x.shape[1])
        shrink[(len(self.tiles), triton.cdiv(rank, BLOCK_R), splits)](
            x, self.scratch, self.tiles, site, self.rows, x.shape[1], x.stride(0), self.ranks,
            BLOCK_M=self.form.tile_rows, BLOCK_R=BLOCK_R, BLOCK_K=BLOCK_K, SPLIT_K=splits, ALIGNED=aligned,
            num_warps=4, num_stages=3 if x.itemsize == 2 else 2,
        )  # fmt: skip

    def expand(self, site: int, x: Tensor, y: Tensor, *, aligned: bool) -> None:
        """The second launch, of what the first made of x."""
        splits = self.form.splits(x.shape[1])
        expand[(len(self.tiles), triton.cdiv(y.shape[1], BLOCK_N))](
            self.scratch, y, self.tiles, site, self.rows, y.shape[1], y.stride(0), self.ranks,
            BLOCK_M=self.form.tile_rows, BLOCK_R=BLOCK_R, BLOCK_N=BLOCK_N, SPLIT_K=splits, ALIGNED=aligned,
            num_warps=4, num_stages=2,
        )  # fmt: skip


def scratch(rows: int, ranks: int, form: Form, device: torch.device) -> Tensor:
    """Memory for h of so many rows and ranks, at any site. Only what shrink has written of it is ever read."""
    return torch.empty(form.most_splits * rows * ranks, dtype=torch.float32, device=device)


# What changes from step to step is never specialised on: an adapter that comes or goes must not compile anything again.
@triton.jit(do_not_specialize=["site", "rows_in_all", "h_row"])
def shrink(
    x: tl.tensor,
    h: tl.tensor,
    tiles: tl.tensor,
    site: tl.tensor,
    rows_in_all: tl.tensor,
    K: tl.tensor,
    x_row: tl.tensor,
    h_row: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """`h[split, rows, :rank] = x[rows] A^T` over a share of K."""
    tile = tiles + tl.program_id(0) * 5
    first, address = tl.load(tile), tl.load(tile + 2)
    count, sites, length = tl.load(tile + 1).to(tl.int32), tl.load(tile + 3), tl.load(tile + 4)
    if (address == 0) | (site >= sites):
        return
    entry = address.to(tl.pointer_type(tl.int64)) + site * length
    rank = tl.load(entry + 1).to(tl.int32)
    a = tl.load(entry).to(tl.pointer_type(x.dtype.element_ty))
    if tl.program_id(1) * BLOCK_R >= rank:
        return
    if ALIGNED:
        # Said of the pointer: said of the number before the cast it is lost, and loads are 2 bytes wide.
        a = tl.multiple_of(a, 16)
    m = tl.arange(0, BLOCK_M)
    rows = first + m  # int64, as all that is multiplied with a stride: x may be longer than 2^31 numbers
    share = tl.cdiv(tl.cdiv(K, SPLIT_K), BLOCK_K) * BLOCK_K
    k_from = tl.program_id(2) * share
    k_to = tl.minimum(k_from + share, K)
    h_row = tl.multiple_of(h_row, 16)
    plane = h + tl.program_id(2).to(tl.int64) * rows_in_all * h_row
    # Programs walk over the ranks, so that the grid of a captured step serves any rank.
    for begin in range(tl.program_id(1) * BLOCK_R, rank, tl.num_programs(1) * BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        sums = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for start in range(k_from, k_to, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            xs = tl.load(
                x + rows[:, None] * x_row + k[None, :], mask=(m < count)[:, None] & (k < k_to)[None, :], other=0.0
            )
            ws = tl.load(
                a + r.to(tl.int64)[None, :] * K + k[:, None], mask=(r < rank)[None, :] & (k < k_to)[:, None], other=0.0
            )
            sums = tl.dot(xs, ws, sums, input_precision="ieee")  # float32 would be TF32
        tl.store(plane + rows[:, None] * h_row + r[None, :], sums, mask=(m < count)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["site", "rows_in_all", "h_row"])
def expand(
    h: tl.tensor,
    y: tl.tensor,
    tiles: tl.tensor,
    site: tl.tensor,
    rows_in_all: tl.tensor,
    N: tl.tensor,
    y_row: tl.tensor,
    h_row: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """`y[rows] += (sum of the planes of h)[rows] B`, for every block of B that meets these columns."""
    tile = tiles + tl.program_id(0) * 5
    first, address = tl.load(tile), tl.load(tile + 2)
    sites, length = tl.load(tile + 3), tl.load(tile + 4)
    count = tl.load(tile + 1).to(tl.int32)
    n_from = tl.program_id(1) * BLOCK_N
    if (address == 0) | (site >= sites):
        return
    entry = address.to(tl.pointer_type(tl.int64)) + site * length
    blocks = tl.load(entry + 2).to(tl.int32)
    block = entry + 3
    b, rank_from, ranks = tl.load(block), tl.load(block + 1).to(tl.int32), tl.load(block + 2).to(tl.int32)
    column, width = tl.load(block + 3).to(tl.int32), tl.load(block + 4).to(tl.int32)
    n = n_from + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    rows = first + m
    at = y + rows[:, None] * y_row + n[None, :]
    mask = (m < count)[:, None] & (n < N)[None, :]
    if BLOCK_M <= 16:
        # On its way while the table is read, though some programs find that they do not need it. More rows would be spilled.
        was = tl.load(at, mask=mask, other=0.0)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    met = 0
    for number in range(blocks):
        if (column < n_from + BLOCK_N) & (column + width > n_from):
            met += 1
            sums = _block(
                h, y, b, rank_from, ranks, column, width, rows, m < count, n, sums, rows_in_all, h_row,
                BLOCK_R, SPLIT_K, ALIGNED,
            )  # fmt: skip
        block += 5
        more = number + 1 < blocks
        b = tl.load(block, mask=more, other=0)
        rank_from = tl.load(block + 1, mask=more, other=0).to(tl.int32)
        ranks = tl.load(block + 2, mask=more, other=0).to(tl.int32)
        column = tl.load(block + 3, mask=more, other=0).to(tl.int32)
        width = tl.load(block + 4, mask=more, other=0).to(tl.int32)
    if met > 0:
        if BLOCK_M > 16:
            was = tl.load(at, mask=mask, other=0.0)
        tl.store(at, (was.to(tl.float32) + sums).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _block(
    h: tl.tensor,
    y: tl.tensor,
    address: tl.tensor,
    rank_from: tl.tensor,
    ranks: tl.tensor,
    column: tl.tensor,
    width: tl.tensor,
    rows: tl.tensor,
    ours: tl.tensor,
    n: tl.tensor,
    sums: tl.tensor,
    rows_in_all: tl.tensor,
    h_row: tl.tensor,
    BLOCK_R: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    dtype: tl.constexpr = y.dtype.element_ty
    b = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        b = tl.multiple_of(b, 16)
        # A hint would be lost as well: these come from one pass of a loop to the next.
        column = column // 8 * 8
        width = width // 8 * 8
    inside = (n >= column) & (n < column + width)
    plane = rows_in_all.to(tl.int64) * h_row
    for start in range(0, ranks, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = ours[:, None] & (r < ranks)[None, :]
        hs = tl.zeros((rows.shape[0], BLOCK_R), tl.float32)
        for split in tl.static_range(SPLIT_K):
            hs += tl.load(h + split * plane + rows[:, None] * h_row + (rank_from + r)[None, :], mask=mask, other=0.0)
        ws = tl.load(
            b + r.to(tl.int64)[:, None] * width + (n - column)[None, :],
            mask=(r < ranks)[:, None] & inside[None, :],
            other=0.0,
        )
        sums = tl.dot(hs.to(dtype), ws, sums, input_precision="ieee")
    return sums
