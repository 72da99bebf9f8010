"""What the GPU of this process is.

Decides nothing; asks torch, in one place, so that those who decide can be told of another GPU.
"""

from __future__ import annotations

import torch


def compute_capability(device: str) -> tuple[int, int] | None:
    """The compute capability of a CUDA device; None for any other device, and where torch sees no GPU."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)
