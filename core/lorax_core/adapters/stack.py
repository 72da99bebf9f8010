"""Several adapters as one, each with a weight.

Decides how their sum is formed: the ranks of all members stand side by side, each member's B times its weight, so the result is
exactly the weighted sum of what they add. Magnitudes, replacements, token rows and heads cannot be summed: an error names them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch

from lorax_core.adapters.base import Adapter, Bound, Delta, fits_dtype
from lorax_core.adapters.deltas import EmbeddingLowRank, LowRank, cast_to, summed
from lorax_core.errors import AdapterError
from lorax_core.types import Task
from lorax_core.weights.loader import LoadedModel


def check_weights(wanted: Mapping[str, float]) -> None:
    """Raises AdapterError for what is no weighted sum of adapters by their names."""
    if not wanted:
        raise AdapterError("a weighted sum of adapters needs at least one", hint="such as {'a': 0.7, 'b': 0.3}")
    for name, weight in wanted.items():
        if not math.isfinite(weight):
            raise AdapterError(f"{name!r} has weight {weight}, which is not a finite number", hint="try 0.7")


def stack_identity(weights: Mapping[str, float]) -> str:
    """The identity of a weighted sum: of its members' identities, each with the sum of its weights."""
    # Sorted: the same members named in another order are the same sum, and share a slot on the device.
    return hashlib.sha256(repr(sorted(weights.items())).encode()).hexdigest()


class StackedAdapter(Adapter):
    """The weighted sum of adapters: a weight for each identity, and those `members` that are in host memory.

    A member that is not must be bound where the sum is.
    """

    kind = "stack"

    def __init__(self, weights: Mapping[str, float], members: Mapping[str, Adapter], task: Task | None = None) -> None:
        self.weights = dict(sorted(weights.items()))
        self.members = dict(members)
        self.identity = stack_identity(self.weights)
        self.task = task
        self.ranks = ()

    def bind(self, base: LoadedModel, *, meta: bool = False, others: Mapping[str, Bound] | None = None) -> Bound:
        """The sum of the members and of `others`, which are bound already.

        Raises AdapterError for one that is missing or does more than add.
        """
        bounds = {identity: adapter.bind(base, meta=meta) for identity, adapter in self.members.items()}
        found: dict[str, list[tuple[Delta, float]]] = {}
        for identity, weight in self.weights.items():
            # A Bound has no __bool__ or __len__, so `or` passes over a missing one only.
            bound = bounds.get(identity) or (others or {}).get(identity)
            if bound is None:
                raise AdapterError(
                    f"the adapter {identity[:12]} of a weighted sum is not on the device any more",
                    hint="ask again, and it is loaded again",
                )
            if bound.not_a_sum is not None:
                raise AdapterError(
                    f"the adapter {identity[:12]} cannot be part of a weighted sum: it has {bound.not_a_sum}",
                    hint="name it alone",
                )
            for path, deltas in bound.deltas.items():
                found.setdefault(path, []).extend((delta, weight) for delta in deltas)
        with fits_dtype("a weighted sum of adapters"):
            return Bound({path: (_summed(deltas),) for path, deltas in found.items()})


def _summed(deltas: Sequence[tuple[Delta, float]]) -> LowRank | EmbeddingLowRank:
    """`sum of weight * B A` as one product: A's ranks side by side, B's times their weights."""
    # A site is a layer or an embedding, so one embedding delta means that all are.
    embedding = [(delta, weight) for delta, weight in deltas if isinstance(delta, EmbeddingLowRank)]
    if embedding:
        a = torch.cat([delta.a for delta, _ in embedding], dim=1)  # [vocab, sum of ranks]
        b = torch.cat([delta.b * weight for delta, weight in embedding], dim=1)  # [dim, sum of ranks]
        return EmbeddingLowRank(a, cast_to(b, b.device, b.dtype))
    return summed(delta.times(weight) for delta, weight in deltas if isinstance(delta, LowRank))
