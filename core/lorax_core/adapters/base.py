"""What an adapter is.

Decides the interface that files, store and batches share. Knows nothing of formats: `lora` reads one of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor

from lorax_core.modeling.batch import Speculator
from lorax_core.modeling.heads import Head
from lorax_core.modeling.site import Site
from lorax_core.types import Task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lorax_core.weights.loader import LoadedModel


class Delta(Protocol):
    """What an adapter does at one site, in the dtype and on the device of the model."""

    @property
    def nbytes(self) -> int:
        """Memory on the device."""

    def apply(self, site: Site, x: Tensor, y: Tensor) -> None:
        """Change y `[rows, out]`, which the base layer (and deltas before this one) made of x `[rows, in]`, in place."""


class Bound(Protocol):
    """What an adapter is on a model's device."""

    @property
    def deltas(self) -> Mapping[str, Sequence[Delta]]: ...
    @property
    def head(self) -> Head | None: ...
    @property
    def speculator(self) -> Speculator | None: ...


class Adapter(ABC):
    """Something that changes a model for the rows that name it.

    `identity` is a hash of content, equal for equal content whatever the name or path; it keys caches and shared memory.
    An adapter is bound to one model before use, and may be bound again after `unbind`; rows in flight keep the object, so
    unloading never disturbs them.
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def identity(self) -> str:
        """Hash of the tensors and of the settings that change their effect."""

    @property
    @abstractmethod
    def is_bound(self) -> bool:
        """Whether it is on a model's device, ready to compute."""

    @property
    @abstractmethod
    def targets(self) -> tuple[str, ...]:
        """Paths of the sites that it changes; known once it has been bound."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory on the device while bound."""

    @property
    @abstractmethod
    def deltas(self) -> Mapping[str, Sequence[Delta]]:
        """Site path to what is done there, in order."""

    @property
    def task(self) -> Task | None:
        """What it was trained for; None when it serves any task."""
        return None

    @property
    def head(self) -> Head | None:
        """The head that it brings for its task, None when the base's serves. Its numbers are there while it is bound."""
        return None

    @property
    def speculator(self) -> Speculator | None:
        """What guesses tokens ahead for its rows, while it is bound; None for an adapter that does not."""
        return None

    @abstractmethod
    def bind(self, base: LoadedModel) -> None:
        """Place every part on its site of `base`; raises AdapterError naming the part that has none, changing nothing."""

    @abstractmethod
    def unbind(self) -> None:
        """Give the device memory back."""


class FileAdapter(Adapter):
    """An adapter that was read from a folder, and can be read from it again."""

    path: Path
    guesses_ahead: int = 0
    """How many tokens its speculator guesses; 0 without one."""

    @property
    @abstractmethod
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks of its updates, ascending."""

    @property
    @abstractmethod
    def not_a_sum(self) -> str | None:
        """What it does beside adding to outputs, in words, so that it cannot be part of a sum; known once it was bound."""

    @property
    @abstractmethod
    def holds_files(self) -> bool:
        """Whether what was read is in host memory."""

    @abstractmethod
    def forget_files(self) -> None:
        """Give back the host memory of what was read; the device's copy stays. It is read again when needed."""

    @abstractmethod
    def deltas_for(self, base: LoadedModel) -> Mapping[str, Sequence[Delta]]:
        """Its deltas for a model that it fits, without being bound to it."""
