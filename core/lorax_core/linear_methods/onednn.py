"""Linear layers packed for oneDNN: two to three times faster than the plain product on a CPU in float32.

Decides which weights are packed, and that few rows take a compiled product over the same packed weight, which a step then
waits for no longer than for its memory. Knows nothing of torch's private operators; `kernels.onednn` calls them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lorax_core.kernels import onednn
from lorax_core.kernels.native.skinny import SkinnyProduct, load_skinny
from lorax_core.linear_methods.base import LinearKernel, LinearMethod
from lorax_core.settings import Settings

_WIDE = torch.backends.cpu.get_cpu_capability() == "AVX512"
FEW_ROWS = {torch.float32: 24, torch.bfloat16: 48} if _WIDE else {torch.float32: 2, torch.bfloat16: 12}
"""Up to so many rows take the compiled product; with more, oneDNN's is as fast.

Measured on 2 cores with AVX-512 at the sizes of GPT-2 and Qwen2-0.5B, oneDNN's seconds over ours: 1.1 to 1.4 at 2 rows, 1.02 to
1.2 at 16 and 24, 1.0 to 1.08 at 32 in float32; 1.2 to 1.75, 1.05 to 1.27 and 1.02 to 1.2 in bfloat16, 1.0 to 1.1 at 48.
"""


@dataclass(frozen=True, slots=True)
class Skinny:
    """The compiled product of one weight: `blocks` is how it lies packed, `out` how many of its rows count."""

    product: SkinnyProduct
    blocks: Tensor
    out: int


@dataclass(frozen=True, slots=True)
class OneDnnKernel(LinearKernel):
    """A packed weight and, where its layout is known, a way to its rows and a product for few of them."""

    method: ClassVar[str] = "onednn"
    packed: Tensor
    bias: Tensor | None
    reader: onednn.PackedRows | None
    skinny: Skinny | None = None

    def __call__(self, x: Tensor) -> Tensor:
        skinny = self.skinny
        if skinny is not None and 0 < x.shape[0] <= FEW_ROWS[x.dtype] and x.dim() == 2:
            return skinny.product(x, skinny.blocks, self.bias, skinny.out)
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
    copies = True

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
        reader = onednn.find_rows(packed, weight) if rows else None
        return OneDnnKernel(packed, bias, reader, _skinny(packed, weight))


def _skinny(packed: Tensor, weight: Tensor) -> Skinny | None:
    """The compiled product of a packed weight; None where it is not there, or gives other numbers than oneDNN's."""
    product, _ = load_skinny(Settings.from_env())
    if product is None:
        return None
    out, width = weight.shape
    # Of each weight, not of one for each shape: which layout it has is oneDNN's own affair.
    x = torch.linspace(-1, 1, 2 * width).view(2, width).cos().to(weight.dtype)  # [2, in]
    expected = onednn.linear(x, packed, None).float()  # [2, out]
    for blocks in onednn.layouts(packed, out, width, weight.dtype):
        if product.reads(blocks):
            off = (product(x, blocks, None, out).float() - expected).abs().amax()
            # Rounding of the result, and sums in another order; another layout is off by as much as the numbers themselves.
            if off <= (1e-5 if weight.dtype is torch.float32 else 1e-2) * expected.abs().amax():
                return Skinny(product, blocks, out)
    return None
