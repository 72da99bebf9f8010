"""What adapters do to the output of a layer.

Decides the arithmetic of each kind, twice over: added to the rows of a batch, and merged into a weight. Every delta changes
rows of y in place and leaves other rows alone; `part` is the range of output columns that it acts on, all of them when None.
Knows nothing of files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from lorax_core.adapters.base import Delta
from lorax_core.modeling.site import Site

Part = slice | None
_ALL = slice(None)
T = TypeVar("T", bound=Delta)
Merged = tuple[Tensor, Tensor | None]


def placed(delta: T, part: Part, device: torch.device, dtype: torch.dtype) -> T:
    """The same delta for a part of a site, its floating-point tensors in `dtype`, all of them on `device`."""
    changes: dict[str, object] = {
        # Token ids are tensors too, and stay integers.
        name: cast_to(tensor, device, dtype) if tensor.is_floating_point() else tensor.to(device)
        for name, tensor in _tensors(delta).items()
    }
    if part is not None:
        changes["part"] = part
    return dataclasses.replace(delta, **changes)  # type: ignore[type-var]


def cast_to(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype` on `device`; raises OverflowError for numbers that `dtype` cannot hold.

    They would be infinite there, and every answer NaN without an error.
    """
    made = tensor.to(device, dtype)
    if not made.is_meta and not torch.isfinite(made).all():
        raise OverflowError(f"its numbers are larger than {str(dtype).removeprefix('torch.')} can hold")
    return made


def _tensors(delta: object) -> dict[str, Tensor]:
    found = {field.name: getattr(delta, field.name) for field in dataclasses.fields(delta)}  # type: ignore[arg-type]
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


class _Tensors:
    """A delta whose fields are its tensors."""

    __slots__ = ()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in _tensors(self).values())


def _bias(site: Site, part: Part) -> Tensor | None:
    bias = cast("Tensor | None", getattr(site, "bias", None))
    return bias if bias is None else bias[part or _ALL]


@dataclass(frozen=True, slots=True)
class RankBlock:
    """What some ranks of an update add to the columns from `column` on: b `[ranks, width]` is B transposed, with the scale."""

    ranks: slice
    column: int
    b: Tensor

    @property
    def columns(self) -> slice:
        """The columns of the layer's output that it adds to."""
        return slice(self.column, self.column + self.b.shape[1])


@dataclass(frozen=True, slots=True)
class LowRank:
    """`y += (x A^T) B^T + bias`: a `[rank, in]`, and B in blocks, one for each part of a fused layer that is updated.

    Blocks share no columns. What B has no block for is zero and costs nothing.
    """

    a: Tensor
    blocks: tuple[RankBlock, ...]
    bias: Tensor | None = None
    not_a_sum = None

    @classmethod
    def whole(cls, a: Tensor, b: Tensor, bias: Tensor | None = None) -> LowRank:
        """An update of all columns: a `[rank, in]`, b `[out, rank]` with the scale."""
        # Transposed and contiguous once here, so that no step pays for it.
        return cls(a, (RankBlock(slice(0, len(a)), 0, b.t().contiguous()),), bias)

    @property
    def nbytes(self) -> int:
        blocks = sum(block.b.nbytes for block in self.blocks)
        return self.a.nbytes + blocks + (self.bias.nbytes if self.bias is not None else 0)

    def times(self, weight: float) -> LowRank:
        """What it adds, times a number; raises OverflowError when that is more than its dtype can hold."""
        blocks = tuple(
            RankBlock(block.ranks, block.column, cast_to(block.b * weight, block.b.device, block.b.dtype))
            for block in self.blocks
        )
        return LowRank(self.a, blocks, self.bias * weight if self.bias is not None else None)

    def placed(self, part: Part, out: int, device: torch.device, dtype: torch.dtype) -> LowRank:
        """The same update, of a part of a layer with `out` columns, in `dtype` on `device`."""
        columns = part or slice(0, out)
        blocks = (
            RankBlock(block.ranks, columns.start + block.column, cast_to(block.b, device, dtype))
            for block in self.blocks
        )
        bias: Tensor | None = None
        if self.bias is not None:
            bias = torch.zeros(out, device=device, dtype=dtype)
            bias[columns] = cast_to(self.bias, device, dtype)
        return LowRank(cast_to(self.a, device, dtype), tuple(blocks), bias)

    def add(self, x: Tensor, y: Tensor) -> None:
        """The product alone, added to y `[rows, out]` for x `[rows, in]`."""
        h = x @ self.a.t()  # [rows, rank]
        for block in self.blocks:
            # Into the view of y itself: no second tensor of the size of the output.
            y[:, block.columns].addmm_(h[:, block.ranks], block.b)

    def apply(self, site: Site, x: Tensor, y: Tensor) -> None:
        self.add(x, y)
        if self.bias is not None:
            y += self.bias

    def merged(self, weight: Tensor, bias: Tensor | None) -> Merged:
        weight = weight.clone()
        for block in self.blocks:
            # [width, ranks] @ [ranks, in]
            weight[block.columns] += block.b.t() @ self.a[block.ranks]
        return weight, bias if self.bias is None else self.bias if bias is None else bias + self.bias


def summed(updates: Iterable[LowRank]) -> LowRank:
    """The sum of updates of one layer as one: the ranks of all that add to the same columns side by side."""
    pairs: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}  # A and B of each range of columns
    biases: list[Tensor] = []
    for update in updates:
        for block in update.blocks:
            # By columns: q of one adapter and v of another share no ranks, so no zeros are multiplied.
            pairs.setdefault((block.column, block.b.shape[1]), []).append((update.a[block.ranks], block.b))
        if update.bias is not None:
            biases.append(update.bias)
    blocks: list[RankBlock] = []
    ranks: list[Tensor] = []
    for (column, _), members in pairs.items():
        start = sum(map(len, ranks))
        ranks += [a for a, _ in members]
        blocks.append(RankBlock(slice(start, sum(map(len, ranks))), column, _joined([b for _, b in members])))
    return LowRank(_joined(ranks), tuple(blocks), torch.stack(biases).sum(0) if biases else None)


def _joined(parts: list[Tensor]) -> Tensor:
    """One below the other."""
    first = parts[0]
    if first.is_meta:  # `cat` would make torch import its compiler, which takes a second, for shapes alone
        return first.new_empty(sum(map(len, parts)), *first.shape[1:])
    return torch.cat(parts)


@dataclass(frozen=True, slots=True)
class EmbeddingLowRank(_Tensors):
    """`y += A^T[ids] B^T` for ids `[rows]`: a `[vocab, rank]` (A transposed), b `[dim, rank]` with the scale in it.

    With `gain` `[dim]` (DoRA) the sum with the base's row is multiplied by it.
    """

    a: Tensor
    b: Tensor
    gain: Tensor | None = None

    @property
    def not_a_sum(self) -> str | None:
        return None if self.gain is None else "a magnitude (DoRA)"

    def apply(self, site: Site, x: Tensor, y: Tensor) -> None:
        update = self.a[x] @ self.b.t()  # [rows, dim]
        # Through the layer, which may scale its rows.
        y += site.computed_with(torch.arange(len(update), device=x.device), update, None)
        if self.gain is not None:
            y *= self.gain

    def merged(self, weight: Tensor, bias: Tensor | None) -> Merged:
        weight = weight + self.a @ self.b.t()
        return weight if self.gain is None else weight * self.gain, bias


@dataclass(frozen=True, slots=True)
class Dora(_Tensors):
    """`y = gain * (x W^T + (x A^T) B^T) + bias`, where y came in as `x W^T + bias`; the scale is in b."""

    a: Tensor
    b: Tensor
    gain: Tensor  # [out]
    part: Part = None
    not_a_sum = "a magnitude (DoRA)"

    def apply(self, site: Site, x: Tensor, y: Tensor) -> None:
        y = y[:, self.part or _ALL]  # [rows, columns of the part], a view
        bias = _bias(site, self.part)
        # PEFT's DoRA scales the products alone, so the bias has to come out first.
        if bias is not None:
            y -= bias
        y += (x @ self.a.t()) @ self.b.t()  # [rows, rank] @ [rank, columns]
        y *= self.gain
        if bias is not None:
            y += bias

    def merged(self, weight: Tensor, bias: Tensor | None) -> Merged:
        rows, weight = self.part or _ALL, weight.clone()
        weight[rows] = (weight[rows] + self.b @ self.a) * self.gain[:, None]
        return weight, bias


@dataclass(frozen=True, slots=True)
class Shift(_Tensors):
    """`y += vector`: the difference between a bias that was trained and the base's."""

    vector: Tensor
    part: Part = None
    not_a_sum = "a replaced weight or bias"

    def apply(self, site: Site, x: Tensor, y: Tensor) -> None:
        columns = y[:, self.part or _ALL]
        columns += self.vector

    def merged(self, weight: Tensor, bias: Tensor | None) -> Merged:
        bias = torch.zeros(len(weight)) if bias is None else bias.clone()
        bias[self.part or _ALL] += self.vector
        return weight, bias


@dataclass(frozen=True, slots=True)
class Replacement(_Tensors):
    """The layer computed with another weight, or another bias, or both; what is None stays the base's."""

    weight: Tensor | None
    bias: Tensor | None
    part: Part = None
    not_a_sum = "a replaced weight or bias"

    def apply(self, site: Site, x: Tensor, y: Tensor) -> None:
        columns = self.part or _ALL
        weight = self.weight if self.weight is not None else site.dense_weight()[columns]
        bias = self.bias if self.bias is not None else _bias(site, self.part)
        # Computed again: what the base layer made of x cannot be taken apart again.
        y[:, columns].copy_(site.computed_with(x, weight, bias))

    def merged(self, weight: Tensor, bias: Tensor | None) -> Merged:
        rows = self.part or _ALL
        if self.weight is not None:
            weight = weight.clone()
            weight[rows] = self.weight
        if self.bias is not None:
            bias = torch.zeros(len(weight)) if bias is None else bias.clone()
            bias[rows] = self.bias
        return weight, bias


@dataclass(frozen=True, slots=True)
class _TrainedTokens(_Tensors):
    """Numbers of single tokens: ids `[n]` ascending, rows `[n, dim]`."""

    ids: Tensor
    rows: Tensor
    not_a_sum = "trained tokens"

    def merged(self, weight: Tensor, bias: Tensor | None) -> Merged:
        return weight.index_copy(0, self.ids, self.rows), bias


class TokenRows(_TrainedTokens):
    """New embeddings of single tokens."""

    __slots__ = ()

    def apply(self, site: Site, x: Tensor, y: Tensor) -> None:
        at = torch.searchsorted(self.ids, x).clamp(max=len(self.ids) - 1)  # [rows]
        # searchsorted gives the place of the next larger id where x is none of them; those rows keep y.
        mine = self.ids[at] == x
        y.copy_(torch.where(mine[:, None], site.computed_with(at, self.rows, None), y))


class TokenLogits(_TrainedTokens):
    """The other side of `TokenRows` in a tied head: logits of single tokens come from their new rows."""

    __slots__ = ()

    def apply(self, site: Site, x: Tensor, y: Tensor) -> None:
        bias = _bias(site, None)
        logits = x @ self.rows.t()  # [rows, ids]
        y[:, self.ids] = logits if bias is None else logits + bias[self.ids]
