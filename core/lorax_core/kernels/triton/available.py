"""Whether Triton's kernels can be used on a device.

Decides by what is installed and what the device is; nothing is imported or compiled. Knows nothing of the kernels.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

import torch

MIN_CAPABILITY: Final = (8, 0)
"""Below it there are no products in bfloat16, and nothing here was compiled for it."""

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels compute in."""


def unavailable(dtype: torch.dtype, device: torch.device) -> str | None:
    """None where Triton's kernels can compute in `dtype` on `device`, else the reason why not."""
    if device.type != "cuda":
        return f"it computes on CUDA devices, not on {device}"
    if torch.version.hip is not None:
        return "it computes on NVIDIA GPUs, not on AMD's"
    if find_spec("triton") is None:
        return "the package triton is not installed; `pip install triton`"
    if dtype not in DTYPES:
        return f"it computes in float32, bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        found, needed = (".".join(map(str, one)) for one in (capability, MIN_CAPABILITY))
        return f"the GPU has compute capability {found}; at least {needed} is needed"
    return None
