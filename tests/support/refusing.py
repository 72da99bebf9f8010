"""Attention backends that compute as the reference does, but do not support some models."""

from __future__ import annotations

from lorax_core.attention.torch import TorchBackend


class RefusesWindows(TorchBackend):
    """Supports no layer with a window."""

    def layout(self, specs, dtype, kv_dtype, device, page_size=None):
        if any(spec.window is not None for spec in specs):
            return "windows are not supported"
        return super().layout(specs, dtype, kv_dtype, device, page_size)


class RefusesAll(TorchBackend):
    """Supports no layer."""

    def layout(self, specs, dtype, kv_dtype, device, page_size=None):
        return f"heads of {specs[0].head_dim} are not supported"
