"""Which form computes the elementwise arithmetic of a model.

Decides by rule: Triton's on a GPU and the compiled one on a CPU where they can be used, else the readable one, with the reason.
Knows nothing of layers.
"""

from __future__ import annotations

import torch

from lorax_core.kernels.elementwise import READABLE, Elementwise
from lorax_core.kernels.native.elementwise import DTYPES, load_elementwise
from lorax_core.kernels.triton.available import unavailable
from lorax_core.settings import Settings


def select_elementwise(dtype: torch.dtype, device: torch.device) -> tuple[Elementwise, str]:
    """The form for a model of this dtype on this device, for `Model.use_elementwise`, and why it is this one."""
    if device.type == "cpu":
        return _on_a_cpu(dtype, Settings.from_env())
    problem = unavailable(dtype, device)
    if problem is not None:
        return READABLE, f"no triton kernels: {problem}"
    from lorax_core.kernels.triton.elementwise import TritonElementwise

    return TritonElementwise(), f"compiled by triton for {device}"


def _on_a_cpu(dtype: torch.dtype, settings: Settings) -> tuple[Elementwise, str]:
    if dtype not in DTYPES:
        return READABLE, f"no native kernels: they compute in float32 and bfloat16, not in {dtype}".replace(
            "torch.", ""
        )
    native, reason = load_elementwise(settings)
    return (READABLE, f"no native kernels: {reason}") if native is None else (native, reason)
