"""Weights of 8 and 4 bits, and their product in plain torch.

Decides the format: which inputs share a scale, how codes lie in memory, and how rows are rounded before they are multiplied.
`native/quantized.cpp` computes the same, faster. Knows nothing of layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from lorax_core.kernels.large_pages import large_pages

OUTPUTS: Final = 64
"""Rows of the weight whose codes lie side by side."""
_LEAST: Final = 1e-36
"""Groups whose largest number is smaller count as 0: their scale would have no inverse."""


@dataclass(frozen=True, slots=True)
class Format:
    """`bits` of a code, and how many inputs in a row (`group`) share a scale in bfloat16."""

    bits: int
    group: int

    @property
    def middle(self) -> int:
        """The code of 0."""
        return 1 << (self.bits - 1)

    @property
    def code_bytes(self) -> int:
        """Of one record: the codes of one group for `OUTPUTS` rows. Their scales follow."""
        return OUTPUTS * self.group * self.bits // 8

    def groups(self, width: int) -> int:
        """Groups of a row."""
        return -(-width // self.group)

    @property
    def record(self) -> int:
        """Bytes of a record."""
        return self.code_bytes + 2 * OUTPUTS

    def empty(self, out: int, width: int) -> Tensor:
        """Memory for a weight `[out, width]`: `[blocks, groups, bytes]`."""
        shape = -(-out // OUTPUTS), self.groups(width), self.record
        return large_pages(math.prod(shape)).view(shape)


FORMATS: Final = {"int8": Format(bits=8, group=64), "int4": Format(bits=4, group=32)}


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight `[out, width]` in 8 or 4 bits; `data` is `[blocks, groups, bytes]`, in `dtype` when it is unpacked."""

    format: Format
    data: Tensor
    out: int
    width: int
    dtype: torch.dtype

    def dense(self) -> Tensor:
        """The weight that the codes stand for, `[out, width]`."""
        weight = (self.codes() * self.scales()[:, :, None]).flatten(1)
        return self._in_dtype(weight[: self.out, : self.width])

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `[n, width]` of `dense()` for ids `[n]`."""
        block, row = ids // OUTPUTS, ids % OUTPUTS
        scales = self._stored_scales()[block, :, row].float()[:, :, None]  # [n, groups, 1]
        # Only the four bytes of this row out of each 64 times four.
        codes = self._unpacked(self._steps()[block, :, :, row])  # [n, groups, group / 4, 4]
        weight = codes.flatten(2) * scales  # [n, groups, group]
        return self._in_dtype(weight.flatten(1)[:, : self.width])

    def codes(self) -> Tensor:
        """Numbers around 0, `[out, groups, group]` with rows to fill the last record."""
        steps = self._unpacked(self._steps())  # [blocks, groups, group / 4, OUTPUTS, 4]
        return steps.permute(0, 3, 1, 2, 4).reshape(len(steps) * OUTPUTS, steps.shape[1], self.format.group)

    def scales(self) -> Tensor:
        """Of each group, `[out, groups]` with rows to fill the last record."""
        return self._stored_scales().float().transpose(1, 2).flatten(0, 1)

    def _in_dtype(self, weight: Tensor) -> Tensor:
        """New memory. A scale that was rounded up may make more of the largest number than the dtype has."""
        most = torch.finfo(self.dtype).max
        return weight.clamp(-most, most).to(self.dtype)

    def _steps(self) -> Tensor:
        """Bytes of the codes `[blocks, groups, steps, OUTPUTS, 4]`, a view."""
        return self.data[:, :, : self.format.code_bytes].view(*self.data.shape[:2], -1, OUTPUTS, 4)

    def _unpacked(self, codes: Tensor) -> Tensor:
        """Numbers around 0 in float32; in 4 bits the steps of the second half of a group follow those of the first."""
        if self.format.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], dim=2)
        return codes.float() - self.format.middle

    def _stored_scales(self) -> Tensor:
        """`[blocks, groups, OUTPUTS]` in bfloat16, a view."""
        return self.data.view(torch.bfloat16)[:, :, self.format.code_bytes // 2 :]


def quantize(weight: Tensor, form: Format) -> Quantized:
    """A weight `[out, width]` in this format. What is not finite makes its group's scale NaN."""
    out, width = weight.shape
    data = form.empty(out, width)
    blocks, groups = data.shape[:2]
    padded = F.pad(weight.float(), (0, groups * form.group - width, 0, blocks * OUTPUTS - out))
    numbers = padded.view(blocks, OUTPUTS, groups, form.group).transpose(1, 2)  # [blocks, groups, OUTPUTS, group]
    least, most = (-127, 127) if form.bits == 8 else (-8, 7)
    largest, at = numbers.abs().max(dim=-1)  # [blocks, groups, OUTPUTS]
    if form.bits == 8:
        shares = [1 / 127]
    else:  # the largest in size may be at -8, where 7 is the most on the other side
        largest = -largest.copysign(numbers.gather(-1, at[..., None])[..., 0])
        shares = [0.09375 + 0.0078125 * step for step in range(9)]
    found = torch.zeros_like(largest)
    fewest = torch.full_like(largest, torch.inf)
    for share in shares:  # the least squares of the errors win
        scale = (largest * share).bfloat16().float()
        steps = (numbers * scale.reciprocal()[..., None]).nan_to_num()
        codes = steps.clamp(least, most).round()
        # As shares of the largest, whose square may have no number.
        lost = ((steps - codes) * share).square().sum(-1)
        found = torch.where(lost < fewest, scale, found)
        fewest = torch.minimum(lost, fewest)
    found = torch.where(largest.abs() > _LEAST, found, 0)
    found = torch.where(largest.isfinite(), found, torch.nan)
    codes = (numbers * found.reciprocal()[..., None]).nan_to_num(0, 0, 0).clamp(least, most).round() + form.middle
    # [blocks, groups, group / 4, OUTPUTS, 4]
    steps = codes.to(torch.uint8).view(*codes.shape[:3], -1, 4).transpose(2, 3)
    if form.bits == 4:
        first, second = steps.chunk(2, dim=2)
        steps = first | second << 4
    data[:, :, : form.code_bytes] = steps.flatten(2)
    data[:, :, form.code_bytes :] = found.bfloat16().view(torch.uint8)
    return Quantized(form, data, out, width, weight.dtype)


def rounded(x: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Rows x `[rows, width]` in 8 bits: codes `[rows, groups, group]`, whole numbers, and scales `[rows, groups]`."""
    groups = form.groups(x.shape[1])
    numbers = F.pad(x.float(), (0, groups * form.group - x.shape[1])).view(len(x), groups, form.group)
    largest = numbers.abs().amax(-1)
    largest = torch.where(largest.isfinite(), largest, torch.nan)
    # Not 127 / largest: that is a product with the inverse, and rounds twice.
    by = torch.where(largest > _LEAST, largest.new_tensor(127) / largest, 0)
    return (numbers * by[..., None]).nan_to_num(0, 0, 0).round(), largest / 127


def multiply(x: Tensor, weight: Quantized, bias: Tensor | None) -> Tensor:
    """`x W^T + bias` `[rows, out]` for x `[rows, width]`, which is rounded to 8 bits by the groups of the weight."""
    codes, scales = rounded(x, weight.format)
    theirs, factors = weight.codes(), weight.scales()
    y = torch.zeros(len(x), len(theirs))
    for group in range(codes.shape[1]):
        # Whole numbers below 2^24: exact in float32, in any order.
        sums = codes[:, group] @ theirs[:, group].t()
        y += sums * (factors[:, group] * scales[:, group, None])
    y = y[:, : weight.out]
    return (y if bias is None else y + bias.float()).to(x.dtype)
