"""What an adapter is.

Decides the interface that files, store and batches share. Knows nothing of formats: `lora` reads one of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorax_core.weights.loader import LoadedModel


@dataclass(frozen=True, slots=True)
class LowRank:
    """`y += (x A^T) B^T`: a `[rank, in]`, b `[out, rank]` with the scale already in it."""

    a: Tensor
    b: Tensor


class Adapter(ABC):
    """Something that changes a model for the rows that name it.

    `identity` is a hash of content, equal for equal content whatever the name or path; it keys caches and shared memory.
    An adapter is bound to one model before use; rows in flight keep the object, so unloading never disturbs them.
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def identity(self) -> str:
        """Hash of the tensors and of the settings that change their effect."""

    @property
    @abstractmethod
    def targets(self) -> tuple[str, ...]:
        """Paths of the sites that it changes; known once bound."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory on the device while bound."""

    @property
    @abstractmethod
    def deltas(self) -> Mapping[str, LowRank]:
        """Site path to what is added there, on the model's device in its dtype."""

    @abstractmethod
    def bind(self, base: LoadedModel) -> None:
        """Place every part on its site of `base`; raises AdapterError naming the part that has none, changing nothing."""

    @abstractmethod
    def unbind(self) -> None:
        """Give the device memory back."""
