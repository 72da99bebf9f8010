"""The tensor files of adapters.

Decides how they are read: their shapes alone, before any memory is taken for numbers that somebody else wrote, or into memory
whole. Never mapped: a file that is cut short while it is mapped ends the process, and adapters may lie where others write.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from lorax_core.errors import AdapterError
from lorax_core.untrusted import guarded, regular
from lorax_core.weights.checkpoint import HEADER_BYTES

_FLOATS: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_AGAIN: Final = "copy or download it again"


def read_tensors(files: Iterable[Path], *, shapes_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an adapter's files; with `shapes_only` on the meta device, from the files' headers.

    Raises AdapterError for a file that is damaged or holds other than finite floating-point numbers.
    """
    for file in files:
        # The header first in any case: it says what the numbers would take.
        shapes = dict(_shapes(file))
        if shapes_only:
            yield from shapes.items()
            continue
        for name, tensor in sorted(_loaded(file).items()):
            if not torch.isfinite(tensor).all():
                raise AdapterError(
                    f"{file}: {name!r:.200} holds NaN or infinite numbers",
                    hint="its training has diverged, or the file is damaged: use an earlier checkpoint of the training",
                )
            yield name, tensor


def content(tensor: Tensor) -> bytes:
    """What a hash of an adapter takes of a tensor: its dtype, its shape and its numbers."""
    return f"{tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes()


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers; of shapes alone, whether they could."""
    return one.shape == other.shape if one.is_meta or other.is_meta else torch.equal(one, other)


def _shapes(file: Path) -> Iterator[tuple[str, Tensor]]:
    """What the header of a file says: an 8-byte length, and JSON of that length."""
    size = regular(file, AdapterError)
    with guarded(AdapterError, f"{file} is not a readable safetensors file ({size} bytes)", _AGAIN):
        with file.open("rb") as found:
            length = int.from_bytes(found.read(8), "little")
            if not 0 < length <= min(size - 8, HEADER_BYTES):
                raise AdapterError(
                    f"{file} is not a readable safetensors file ({size} bytes): its header has {length:,} bytes",
                    hint=_AGAIN,
                )
            header = json.loads(found.read(length))
        for name, stated in sorted(header.items()):
            if name == "__metadata__":
                continue
            dtype, shape = _FLOATS.get(stated["dtype"]), tuple(map(int, stated["shape"]))
            if dtype is None:  # 8 bit would need its scales
                raise AdapterError(
                    f"{file}: {name!r:.200} holds {stated['dtype']}; 16, 32 or 64 bit floating point is needed",
                    hint="convert it: tensor.to(torch.float32) for each, then safetensors.torch.save_file",
                )
            if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > size:
                raise AdapterError(
                    f"{file}: {name!r:.200} has shape {list(shape)}, for which it is too short", hint=_AGAIN
                )
            yield name, torch.empty(shape, dtype=dtype, device="meta")


def _loaded(file: Path) -> dict[str, Tensor]:
    data = file.read_bytes()
    try:
        with guarded(AdapterError, f"{file} cannot be read", _AGAIN):
            found: dict[str, Tensor] = load(data)
            return found
    except SafetensorError as error:
        raise AdapterError(
            f"{file} is not a readable safetensors file ({len(data)} bytes): {error}", hint=_AGAIN
        ) from error
