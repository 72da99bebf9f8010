"""Layers whose weight is prepared for this device.

Decides when a layer holds its numbers as a parameter and when in a kernel. Knows nothing of how a method lays a weight out.
"""

from __future__ import annotations

from typing import cast, final

from torch import Tensor, nn

from lorax_core.linear_methods.base import LinearKernel
from lorax_core.linear_methods.plain import PlainKernel
from lorax_core.modeling.site import Site


class PreparedSite(Site):
    """A layer that computes through a kernel.

    While a checkpoint is read `weight` is a parameter; afterwards `prepare_linears` gives the layer a kernel, which holds the
    numbers, and `weight` is None.
    """

    weight: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self._kernel: LinearKernel | None = None

    @property
    def kernel(self) -> LinearKernel:
        """What computes the layer: the prepared kernel, or a plain one over the parameter while there is none."""
        # The plain one is made per call, never kept: loading replaces the parameter (on `meta` first, tied later), and
        # a kept kernel would hold the old one. Untied embeddings stay on this path for good.
        return self._kernel or PlainKernel(cast("Tensor", self.weight), self.bias)

    @property
    def is_prepared(self) -> bool:
        """Whether a kernel holds the numbers."""
        return self._kernel is not None

    def adopt(self, kernel: LinearKernel | None) -> None:
        """Compute with a prepared kernel from now on; None drops it, and the layer has no numbers until it gets another."""
        self._kernel = kernel
        # The kernel may hold a packed copy, so keeping the parameter would double the memory of the weights.
        self.weight = None

    def compute(self, x: Tensor, kernel: LinearKernel) -> Tensor:
        """What the layer makes of x with the numbers of `kernel`; the one method to override."""
        raise NotImplementedError

    @final
    def computed_with(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.compute(x, PlainKernel(weight, bias))

    def dense_weight(self) -> Tensor:
        return self.kernel.dense().detach()

    def _base(self, x: Tensor) -> Tensor:
        return self.compute(x, self.kernel)
