"""Which form computes the elementwise arithmetic of a model.

Decides by rule: Triton's where it can be used, else the readable one, with the reason. Knows nothing of layers.
"""

from __future__ import annotations

import torch

from lorax_core.kernels.elementwise import READABLE, Elementwise
from lorax_core.kernels.triton.available import unavailable


def select_elementwise(dtype: torch.dtype, device: torch.device) -> tuple[Elementwise, str]:
    """The form for a model of this dtype on this device, for `Model.use_elementwise`, and why it is this one."""
    problem = unavailable(dtype, device)
    if problem is not None:
        return READABLE, f"no triton kernels: {problem}"
    from lorax_core.kernels.triton.elementwise import TritonElementwise

    return TritonElementwise(), f"compiled by triton for {device}"
