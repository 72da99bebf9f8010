"""Which kernel computes low-rank products on this machine.

Decides by rule: the first of `KERNELS` that is there, computes in the model's dtype on its device, and gives torch's numbers.
The choice is made once, when the first adapter is bound, and never by the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lorax_core.adapters.deltas import LowRank, RankBlock
from lorax_core.adapters.lora_kernels.base import GraphLora, LoraKernel, LoraPlan, Segment, Updates
from lorax_core.adapters.lora_kernels.native import load_native_kernel
from lorax_core.adapters.lora_kernels.torch import TorchKernel
from lorax_core.adapters.lora_kernels.triton import load_triton_kernel
from lorax_core.settings import Settings

LoadKernel = Callable[[Settings, torch.device], tuple[LoraKernel | None, str]]
"""Gives a kernel for a device and where it comes from, or None and why it is not there."""

Verify = Callable[[LoadKernel], str | None]
"""Why the kernel that a function loads is not to be used; None when it may be."""

KERNELS: tuple[tuple[str, LoadKernel], ...] = (("triton", load_triton_kernel), ("native", load_native_kernel))
"""What core offers beside torch's, by name, the first choice first."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel, and the reason why it is this one."""

    kernel: LoraKernel
    reason: str


def select_kernel(
    dtype: torch.dtype,
    device: torch.device,
    settings: Settings,
    offered: Sequence[tuple[str, LoadKernel]] = KERNELS,
    verify: Verify | None = None,
) -> Choice:
    """The kernel for a model of this dtype on this device: torch's where no other can be used, with each reason.

    `verify` says why a kernel is not to be used after all; None compares it with torch's on a small product, in this process.
    """
    passed_over: list[str] = []
    for name, load in offered:
        kernel, reason = load(settings, device)
        if kernel is not None:
            problem = kernel.supports(dtype, device)
            if problem is None:
                problem = wrong_numbers(kernel, dtype, device) if verify is None else verify(load)
            if problem is None:
                return Choice(kernel, reason)
            reason = problem
        passed_over.append(f"no {name} kernel: {reason}")
    return Choice(TorchKernel(), "; ".join(passed_over))


def wrong_numbers(kernel: LoraKernel, dtype: torch.dtype, device: torch.device) -> str | None:
    """How far a kernel is from torch's on a small product of two adapters, over blocks of uneven sizes; None when it is not."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    # Uneven sizes, columns that begin inside, rows 2 and 5 of no adapter: mistakes of indexing show.
    two = LowRank(drawn(5, 13), (RankBlock(slice(0, 5), 1, drawn(5, 7)),))
    parts = LowRank(drawn(6, 13), (RankBlock(slice(0, 2), 0, drawn(2, 3)), RankBlock(slice(2, 6), 4, drawn(4, 5))))
    segments = [Segment(at, at + 2, Updates({"site": update})) for at, update in ((0, two), (3, parts))]
    x, y = drawn(6, 13), drawn(6, 9)  # [rows, in], [rows, out]
    found, expected = y.clone(), y.float()
    try:
        kernel.plan(segments).add("site", x, found)
    except Exception as error:  # a kernel may be compiled only now, and fails in its own way
        return f"it failed on a small product: {type(error).__name__}: {error}"
    for segment in segments:
        rows = slice(segment.start, segment.stop)
        # In float32 whatever the dtype: the error measured is the kernel's, not that of torch in 16 bit.
        exact = segment.updates.by_site["site"].placed(None, y.shape[1], y.device, torch.float32)
        exact.add(x[rows].float(), expected[rows])
    off = float((found.float() - expected).abs().max() / expected.abs().max())
    # In 16 bit the result is rounded, in float32 sums are only in another order.
    limit = 1e-5 if dtype is torch.float32 else 1e-2
    return None if off < limit else f"it is off by {off:.1e} on a small product"


class AutoKernel(LoraKernel):
    """The selected kernel, which is chosen (and perhaps compiled) when it is first needed or `prepare` is called."""

    name = "auto"

    def __init__(
        self, dtype: torch.dtype, device: torch.device, settings: Settings, verify: Verify | None = None
    ) -> None:
        self._wanted = (dtype, device, settings)
        self.verify = verify
        self._choice: Choice | None = None

    def prepare(self) -> Choice:
        """Choose now, if that has not been done."""
        if self._choice is None:
            self._choice = select_kernel(*self._wanted, verify=self.verify)
        return self._choice

    @property
    def verdict(self) -> tuple[str, str]:
        """The chosen kernel's name and the reason; before any adapter was bound there is no choice."""
        if self._choice is None:
            return "none", "no adapter has been loaded yet"
        return self._choice.kernel.name, self._choice.reason

    def supports(self, dtype: torch.dtype, device: torch.device) -> str | None:
        return None

    def plan(self, segments: Sequence[Segment]) -> LoraPlan:
        return self.prepare().kernel.plan(segments)

    def plan_graph(self, rows: int, sites: Mapping[str, tuple[int, int]]) -> GraphLora | str:
        return self.prepare().kernel.plan_graph(rows, sites)
