"""Attention backends that compute as the reference does, but do not support some models."""

from __future__ import annotations

import torch

from lorax_core.attention.base import AttentionSpec
from lorax_core.attention.torch import TorchBackend


class RefusesWindows(TorchBackend):
    """Supports no layer with a window."""

    def supports(self, spec: AttentionSpec, page_size: int, dtype: torch.dtype, device: str) -> str | None:
        if spec.window is not None:
            return "windows are not supported"
        return super().supports(spec, page_size, dtype, device)


class RefusesAll(TorchBackend):
    """Supports no layer."""

    def supports(self, spec: AttentionSpec, page_size: int, dtype: torch.dtype, device: str) -> str | None:
        return f"heads of {spec.head_dim} are not supported"
