"""oneDNN's packed products on a CPU, behind torch's private operators.

Decides how a weight is packed, multiplied and read again row by row; the only module that names `torch.ops.mkldnn`. The
operators are private to torch, so each is tried before it is relied on. Knows nothing of layers.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)

# Blockings that oneDNN is known to use: output rows in a block, and inputs side by side in a vector.
_ROWS_IN_A_BLOCK = (64, 48, 32, 96, 128, 24, 16, 8)
_INPUTS_IN_A_VECTOR = (1, 2, 4)
_ENDS = 512


def pack(weight: Tensor) -> Tensor:
    """A weight `[out, in]` in oneDNN's own layout, an opaque tensor; `to_dense()` gives the weight back."""
    return cast("Tensor", torch.ops.mkldnn._reorder_linear_weight(weight))


def linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + bias` for x `[rows, in]` and a packed weight, `[rows, out]`."""
    return cast("Tensor", torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], ""))


@functools.cache
def works(dtype: torch.dtype) -> bool:
    """Whether this build of torch packs and multiplies `dtype` as expected, seen on a small product."""
    # Not square, so that a weight read transposed fails; 1e-2 below is the rounding of bfloat16.
    weight = torch.linspace(-1, 1, 12).view(3, 4).to(dtype)  # [3, 4]
    x = torch.linspace(1, -1, 8).view(2, 4).to(dtype)  # [2, 4]
    bias = torch.ones(3, dtype=dtype)  # [3]
    try:
        packed = pack(weight)
        y = linear(x, packed, bias)
        same_weight = torch.equal(packed.to_dense(), weight)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return same_weight and torch.allclose(y.float(), F.linear(x, weight, bias).float(), atol=1e-2)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware; no where torch cannot tell."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported()) and works(torch.bfloat16)


def nbytes(packed: Tensor) -> int:
    """Memory of a packed weight, its padding included."""
    try:
        return int(torch.ops.mkldnn._nbytes(packed))
    except (RuntimeError, AttributeError, NotImplementedError):
        return packed.numel() * packed.element_size()


class PackedRows(NamedTuple):
    """Rows of a packed weight, read where they lie. `blocks` is `[blocks, in / vector, rows of a block, vector]`.

    `blocks` looks into the memory of `packed`, which must live as long.
    """

    blocks: Tensor
    packed: Tensor

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `[n, in]` of the weight for ids `[n]`, in one gather."""
        # `[n, in / vector, vector]` before flattening: the vectors of one row follow each other.
        size = self.blocks.shape[2]
        return self.blocks[ids // size, :, ids % size].flatten(1)


def find_rows(packed: Tensor, weight: Tensor) -> PackedRows | None:
    """How to read single rows of a packed weight; None where its layout is not recognised.

    `weight` `[out, in]` is what was packed: a layout is only taken when rows read through it, from all over, are the weight's.
    """
    out, width = weight.shape
    for blocks in layouts(packed, out, width, weight.dtype):
        found = PackedRows(blocks, packed)
        if _reads(found, weight):
            return found
    return None


def layouts(packed: Tensor, out: int, width: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The ways in which a packed weight `[out, width]` may lie in its memory, `[blocks, in / vector, rows of a block, vector]`.

    Each looks into the memory of `packed`, which must live as long. Which one is right, the numbers must show.
    """
    try:
        address, size = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)
    except (RuntimeError, AttributeError, NotImplementedError):
        return
    if not size or size % dtype.itemsize:
        return
    # No copy: the weight is in memory once, packed, and is read out of that.
    memory = (ctypes.c_char * size).from_address(address)
    flat = torch.frombuffer(memory, dtype=dtype)
    for rows in _ROWS_IN_A_BLOCK:
        blocks = -(-out // rows)
        # oneDNN pads the last block with rows, which `nbytes` counts.
        if blocks * rows * width != flat.numel():
            continue
        for vector in _INPUTS_IN_A_VECTOR:
            if width % vector == 0:
                yield flat.view(blocks, width // vector, rows, vector)


def spread(out: int) -> Tensor:
    """Rows that stand for all `out` of a weight: all of a small one, else those at both ends and some between.

    Layouts are periodic, so what is wrong anywhere is wrong there, too; to look at a whole vocabulary takes a second.
    """
    if out <= 4 * _ENDS:
        return torch.arange(out)
    return torch.cat(
        [torch.arange(_ENDS), torch.arange(_ENDS, out - _ENDS, out // _ENDS), torch.arange(out - _ENDS, out)]
    )


def _reads(found: PackedRows, weight: Tensor) -> bool:
    """Whether rows read so are the weight's, bit for bit."""
    ids = spread(len(weight))
    return torch.equal(found.rows(ids), weight[ids])
