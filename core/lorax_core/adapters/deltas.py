"""What adapters do to the output of a layer.

Decides the arithmetic of each kind. Every delta changes rows of y in place and leaves other rows alone; `part` is the range of
output columns that it acts on, all of them when None. Knows nothing of files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lorax_core.modeling.site import Site

Part = slice | None


def _columns(y: Tensor, part: Part) -> Tensor:
    return y if part is None else y[:, part]


def _bias(site: Site, part: Part) -> Tensor | None:
    bias = cast("Tensor | None", getattr(site, "bias", None))
    return bias if bias is None or part is None else bias[part]


@dataclass(frozen=True, slots=True)
class Block:
    """What some ranks of an update add, to the columns from `column` on: b `[ranks, width]` is B transposed, with the scale."""

    ranks: slice
    column: int
    b: Tensor


@dataclass(frozen=True, slots=True)
class LowRank:
    """`y += (x A^T) B^T + bias`: a `[rank, in]`, and B in blocks, one for each part of a fused layer that is updated.

    Blocks share no columns. What B has no block for is zero and costs nothing.
    """

    a: Tensor
    blocks: tuple[Block, ...]
    bias: Tensor | None = None

    @classmethod
    def whole(cls, a: Tensor, b: Tensor, bias: Tensor | None = None) -> LowRank:
        """An update of all columns: a `[rank, in]`, b `[out, rank]` with the scale."""
        return cls(a, (Block(slice(0, len(a)), 0, b.t().contiguous()),), bias)

    @property
    def nbytes(self) -> int:
        blocks = sum(block.b.nbytes for block in self.blocks)
        return self.a.nbytes + blocks + (self.bias.nbytes if self.bias is not None else 0)

    def add(self, x: Tensor, y: Tensor) -> None:
        """The product alone, added to y `[rows, out]` for x `[rows, in]`."""
        h = x @ self.a.t()  # [rows, rank]
        for block in self.blocks:
            y[:, block.column : block.column + block.b.shape[1]].addmm_(h[:, block.ranks], block.b)

    def apply(self, site: Site, x: Tensor, y: Tensor) -> None:
        self.add(x, y)
        if self.bias is not None:
            y += self.bias


@dataclass(frozen=True, slots=True)
class EmbeddingLowRank:
    """`y += A^T[ids] B^T` for ids `[rows]`: a `[vocab, rank]` (A transposed), b `[dim, rank]` with the scale in it.

    With `gain` `[dim]` (DoRA) the sum with the base's row is multiplied by it.
    """

    a: Tensor
    b: Tensor
    gain: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes + (self.gain.nbytes if self.gain is not None else 0)

    def apply(self, site: Site, x: Tensor, y: Tensor) -> None:
        y.addmm_(self.a[x], self.b.t())
        if self.gain is not None:
            y *= self.gain


@dataclass(frozen=True, slots=True)
class Dora:
    """`y = gain * (x W^T + (x A^T) B^T) + bias`, where y came in as `x W^T + bias`; the scale is in b."""

    a: Tensor
    b: Tensor
    gain: Tensor  # [out]
    part: Part = None

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes + self.gain.nbytes

    def apply(self, site: Site, x: Tensor, y: Tensor) -> None:
        y = _columns(y, self.part)
        bias = _bias(site, self.part)
        if bias is not None:
            y -= bias
        y += (x @ self.a.t()) @ self.b.t()
        y *= self.gain
        if bias is not None:
            y += bias


@dataclass(frozen=True, slots=True)
class Shift:
    """`y += vector`: the difference between a bias that was trained and the base's."""

    vector: Tensor
    part: Part = None

    @property
    def nbytes(self) -> int:
        return self.vector.nbytes

    def apply(self, site: Site, x: Tensor, y: Tensor) -> None:
        columns = _columns(y, self.part)
        columns += self.vector


@dataclass(frozen=True, slots=True)
class Replacement:
    """The layer computed with another weight, or another bias, or both; what is None stays the base's."""

    weight: Tensor | None
    bias: Tensor | None
    part: Part = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.weight, self.bias) if tensor is not None)

    def apply(self, site: Site, x: Tensor, y: Tensor) -> None:
        weight = self.weight
        if weight is None:
            weight = site.dense_weight()
            weight = weight if self.part is None else weight[self.part]
        bias = self.bias if self.bias is not None else _bias(site, self.part)
        _columns(y, self.part).copy_(site.computed_with(x, weight, bias))


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Numbers of single tokens: ids `[n]` ascending, rows `[n, dim]`."""

    ids: Tensor
    rows: Tensor

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.rows.nbytes


class TokenRows(_Tokens):
    """New embeddings of single tokens."""

    __slots__ = ()

    def apply(self, site: Site, x: Tensor, y: Tensor) -> None:
        at = torch.searchsorted(self.ids, x).clamp(max=len(self.ids) - 1)  # [rows]
        mine = self.ids[at] == x
        y.copy_(torch.where(mine[:, None], self.rows[at], y))


class TokenLogits(_Tokens):
    """The other side of `TokenRows` in a tied head: logits of single tokens come from their new rows."""

    __slots__ = ()

    def apply(self, site: Site, x: Tensor, y: Tensor) -> None:
        bias = _bias(site, None)
        logits = x @ self.rows.t()  # [rows, ids]
        y[:, self.ids] = logits if bias is None else logits + bias[self.ids]
