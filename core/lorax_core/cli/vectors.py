"""Vectors as files that arrays are kept in: numpy's `.npy`, and `.safetensors` with one tensor, "embeddings".

Decides the bytes of both. Knows nothing of how they come to a disk; the rows stand behind a head of fixed size, which says how
many there are and is known last.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NAME: Final = "embeddings"
"""Of the tensor in a `.safetensors`."""
_NUMBER: Final = 4


def rows(vectors: Iterable[NDArray[np.float32]]) -> bytes:
    """Vectors of one length, end to end: little-endian float32."""
    import numpy as np  # late: help pages need none

    return np.stack(list(vectors)).astype("<f4", copy=False).tobytes()


@dataclass(frozen=True, slots=True)
class NpyHead:
    """`[vectors, dim]` as numpy's format 1.0 says it. `dim` is what there is to say of no vectors."""

    dim: int
    size: int = 128

    @property
    def row(self) -> int:
        """The bytes of a vector."""
        return self.dim * _NUMBER

    def data(self, records: int, written: int) -> bytes:
        """The magic, the version, the length of the rest, and a dict padded with spaces."""
        about = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({records}, {self.dim}), }}"
        return (
            b"\x93NUMPY\x01\x00" + (self.size - 10).to_bytes(2, "little") + about.ljust(self.size - 11).encode() + b"\n"
        )


@dataclass(frozen=True, slots=True)
class SafetensorsHead:
    """The same as safetensors says it."""

    dim: int
    size: int = 256

    @property
    def row(self) -> int:
        """The bytes of a vector."""
        return self.dim * _NUMBER

    def data(self, records: int, written: int) -> bytes:
        """The length of the rest, and JSON padded with spaces."""
        about = {"dtype": "F32", "shape": [records, self.dim], "data_offsets": [0, written]}
        return (self.size - 8).to_bytes(8, "little") + json.dumps({NAME: about}).ljust(self.size - 8).encode()
