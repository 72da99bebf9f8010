"""Linear layers packed for oneDNN: two to three times faster than the plain product on a CPU in float32.

Decides which weights are packed. Knows nothing of torch's private operators; `kernels.onednn` calls them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lorax_core.kernels import onednn
from lorax_core.linear_methods.base import LinearKernel, LinearMethod


@dataclass(frozen=True, slots=True)
class OneDnnKernel(LinearKernel):
    """A packed weight and, where its layout is known, a way to its rows."""

    method: ClassVar[str] = "onednn"
    packed: Tensor
    bias: Tensor | None
    reader: onednn.PackedRows | None

    def __call__(self, x: Tensor) -> Tensor:
        return onednn.linear(x, self.packed, self.bias)

    def dense(self) -> Tensor:
        # A new tensor each time: packing does not keep the rows as they were.
        return self.packed.to_dense()

    @property
    def nbytes(self) -> int:
        return onednn.nbytes(self.packed)

    def with_bias(self, bias: Tensor | None) -> OneDnnKernel:
        return replace(self, bias=bias)

    @property
    def no_rows(self) -> str | None:
        return None if self.reader is not None else "the layout of oneDNN's packed weight is not recognised"

    def rows(self, ids: Tensor) -> Tensor:
        if self.reader is None:
            raise NotImplementedError(self.no_rows)
        return self.reader.rows(ids)


class OneDnn(LinearMethod):
    """oneDNN's product over a packed weight."""

    name = "onednn"

    def supports(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"oneDNN computes on a CPU, not on {device.type}"
        if dtype not in onednn.DTYPES:
            return f"oneDNN's packed product takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        if not onednn.works(dtype):
            return f"this build of torch does not pack {str(dtype).removeprefix('torch.')} on this processor"
        return None

    def prepare(self, weight: Tensor, bias: Tensor | None, *, rows: bool = False) -> OneDnnKernel:
        weight = weight.detach()
        packed = onednn.pack(weight)
        # Recognising the layout reads the whole weight once, so only a weight that is looked up in pays for it.
        return OneDnnKernel(packed, bias, onednn.find_rows(packed, weight) if rows else None)
