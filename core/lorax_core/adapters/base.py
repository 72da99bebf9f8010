"""What an adapter is, and what a model holds of one.

Decides the interface that file formats, the store and the batches share. Knows nothing of any file format.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor

from lorax_core.errors import AdapterError, listed, nearest
from lorax_core.modeling.batch import Speculator
from lorax_core.modeling.heads import Head
from lorax_core.modeling.prepared import PreparedSite
from lorax_core.modeling.site import Site
from lorax_core.types import Task
from lorax_core.weights.loader import LoadedModel


class Delta(Protocol):
    """What an adapter does at one site, in the dtype and on the device of the model."""

    @property
    def nbytes(self) -> int:
        """Memory of its tensors."""

    @property
    def not_a_sum(self) -> str | None:
        """What it does besides adding a product of x, in words; None for a delta that can be part of a weighted sum."""

    def apply(self, site: Site, x: Tensor, y: Tensor) -> None:
        """Change y `[rows, out]`, which the base layer (and deltas before this one) made of x `[rows, in]`, in place."""

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight `[out, in]` (`[vocab, dim]` of an embedding) and bias that do what the layer does under this delta, in
        float32; the arguments are not changed."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Bound:
    """What a model holds of one adapter. Dropping the object frees its memory.

    `deltas` maps the path of a site to its changes, in order; `head` and `speculator` are the adapter's own. `unread` are
    modules of its files that the checkpoint has, but none of the loaded tasks reads.
    """

    deltas: Mapping[str, tuple[Delta, ...]] = field(default_factory=dict)
    head: Head | None = None
    speculator: Speculator | None = None
    unread: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """Paths of the sites that are changed."""
        return tuple(self.deltas)

    @property
    def nbytes(self) -> int:
        """Memory on the device (on the meta device: what it would take)."""
        own = _head_bytes(self.head) if self.head is not None else 0
        own += self.speculator.nbytes if self.speculator is not None else 0
        return own + sum(delta.nbytes for deltas in self.deltas.values() for delta in deltas)

    @property
    def not_a_sum(self) -> str | None:
        """Why it cannot be part of a weighted sum, in words; None when it only adds low-rank products."""
        if self.speculator is not None:
            return "Medusa heads"
        if self.head is not None:
            return "a head"
        found = ((path, delta.not_a_sum) for path, deltas in self.deltas.items() for delta in deltas)
        return next((f"{what} at {path!r}" for path, what in found if what is not None), None)


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """What binding an adapter to a base would give, found without memory on the device.

    `nbytes` is what it will take there. `head` is the adapter's own on the meta device: its task, labels, problem and span
    are known, its numbers are not.
    """

    targets: tuple[str, ...]
    nbytes: int
    head: Head | None
    not_a_sum: str | None
    unread: tuple[str, ...] = ()

    @classmethod
    def of(cls, bound: Bound) -> Fit:
        """The facts of what was bound on the meta device."""
        return cls(bound.targets, bound.nbytes, bound.head, bound.not_a_sum, bound.unread)


class Adapter(ABC):
    """Something that changes a model for the rows that name it: an immutable, picklable value in host memory.

    `identity` is a hash of the tensors and of the settings that change their effect, equal for equal content whatever the
    name or path. `task` is what it was trained for, None when it fits any task; `ranks` are the distinct ranks of its updates,
    ascending; `draft_tokens` is how many tokens its speculator drafts, 0 without one.
    """

    kind: ClassVar[str]
    identity: str
    task: Task | None
    ranks: tuple[int, ...]
    draft_tokens: int = 0

    @abstractmethod
    def bind(self, base: LoadedModel, *, meta: bool = False) -> Bound:
        """Build every delta for its site of `base`, on the model's device; with `meta` on the meta device, without numbers.

        Raises AdapterError naming the part that has no place or another shape.
        """

    def check(self, base: LoadedModel) -> Fit:
        """What `bind` would give; raises what it would raise. Takes no memory on the device."""
        # The same code as binding, so a check cannot pass what binding would refuse.
        return Fit.of(self.bind(base, meta=True))


@contextlib.contextmanager
def fits_dtype(what: str) -> Iterator[None]:
    """Numbers that the model's dtype cannot hold are an AdapterError that names what they are of."""
    try:
        yield
    except OverflowError as error:
        raise AdapterError(
            f"{what}: {error}",
            hint="load the base in float32: load(..., dtype='float32')",
            http_hint="start the server with --dtype float32",
        ) from error


def known(what: str, word: str, words: Iterable[str]) -> str:
    """A word of a setting; raises AdapterError, with the nearest one, for a word that is none of `words`."""
    words = [str(one) for one in words]
    if word not in words:
        close = nearest(str(word), words)
        raise AdapterError(
            f"there is no {what} {word!r:.80}; there are {listed(words)}",
            hint=f"did you mean {close!r}?" if close else f"give one of those for {what}",
        )
    return word


def _head_bytes(head: Head) -> int:
    # A prepared layer has handed its weight to a kernel, so parameters() no longer counts it.
    prepared = sum(
        module.kernel.nbytes for module in head.modules() if isinstance(module, PreparedSite) and module.is_prepared
    )
    return prepared + sum(parameter.nbytes for parameter in head.parameters())
