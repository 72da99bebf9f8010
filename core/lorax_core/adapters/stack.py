"""Several adapters as one, each with a weight.

Decides how their sum is formed: the ranks of all members stand side by side, each member's B times its weight, so the result is
exactly the weighted sum of what they add. Whatever is no sum (magnitudes, replacements, token rows, heads) is refused by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorax_core.adapters.base import Adapter, Delta, FileAdapter
from lorax_core.adapters.deltas import Block, EmbeddingLowRank, LowRank
from lorax_core.errors import AdapterError
from lorax_core.types import Task
from lorax_core.weights.loader import LoadedModel


class StackedAdapter(Adapter):
    """The weighted sum of adapters. Members are `(adapter, weight)`; equal ones add up.

    Raises AdapterError for a member that has been bound once and does more than add.
    """

    kind = "stack"

    def __init__(self, members: Sequence[tuple[FileAdapter, float]]) -> None:
        summed: dict[str, float] = {}
        self._members: dict[str, FileAdapter] = {}
        for adapter, weight in members:
            if adapter.not_a_sum is not None:
                raise AdapterError(
                    f"{adapter.path} cannot be part of a weighted sum: it has {adapter.not_a_sum}",
                    hint="name it alone; only plain low-rank updates can be added up",
                )
            self._members[adapter.identity] = adapter
            summed[adapter.identity] = summed.get(adapter.identity, 0.0) + weight
        self._weights = dict(sorted(summed.items()))
        self._identity = hashlib.sha256(repr(list(self._weights.items())).encode()).hexdigest()
        self._deltas: dict[str, list[Delta]] | None = None

    @property
    def members(self) -> tuple[FileAdapter, ...]:
        """The adapters that are added up."""
        return tuple(self._members.values())

    @property
    def identity(self) -> str:
        return self._identity

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path for adapter in self._members.values() for path in adapter.targets))

    @property
    def nbytes(self) -> int:
        return sum(delta.nbytes for deltas in (self._deltas or {}).values() for delta in deltas)

    @property
    def is_bound(self) -> bool:
        return self._deltas is not None

    @property
    def deltas(self) -> Mapping[str, Sequence[Delta]]:
        if self._deltas is None:
            raise AdapterError("a weighted sum of adapters is not bound to a model any more", hint="send it again")
        return self._deltas

    @property
    def task(self) -> Task | None:
        """The task that all of them were trained for, None when they differ."""
        tasks = {adapter.task for adapter in self._members.values()}
        return tasks.pop() if len(tasks) == 1 else None

    def bind(self, base: LoadedModel) -> None:
        found: dict[str, list[tuple[Delta, float]]] = {}
        for identity, weight in self._weights.items():
            for path, deltas in self._members[identity].deltas_for(base).items():
                found.setdefault(path, []).extend((delta, weight) for delta in deltas)
        self._deltas = {path: [_summed(deltas)] for path, deltas in found.items()}

    def unbind(self) -> None:
        self._deltas = None


def _summed(deltas: Sequence[tuple[Delta, float]]) -> LowRank | EmbeddingLowRank:
    """`sum of weight * B A` as one product: A's ranks side by side, B's times their weights."""
    embedding = [(delta, weight) for delta, weight in deltas if isinstance(delta, EmbeddingLowRank)]
    if embedding:
        a = torch.cat([delta.a for delta, _ in embedding], dim=1)  # [vocab, sum of ranks]
        return EmbeddingLowRank(a, torch.cat([delta.b * weight for delta, weight in embedding], dim=1))
    plain = [(delta, weight) for delta, weight in deltas if isinstance(delta, LowRank)]
    members: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}  # A and weighted B of each range of columns
    for delta, weight in plain:
        for block in delta.blocks:
            where = members.setdefault((block.column, block.b.shape[1]), [])
            where.append((delta.a[block.ranks], block.b * weight))
    blocks: list[Block] = []
    ranks: list[Tensor] = []
    for (column, _), updates in members.items():
        start = sum(map(len, ranks))
        ranks += [a for a, _ in updates]
        blocks.append(Block(slice(start, sum(map(len, ranks))), column, torch.cat([b for _, b in updates])))
    biases = [delta.bias * weight for delta, weight in plain if delta.bias is not None]
    return LowRank(torch.cat(ranks), tuple(blocks), torch.stack(biases).sum(0) if biases else None)
