"""Core's own plugin: the attention backends of lorax-core, declared through the same hook as any plugin's."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_core.plugins.hookspecs import hookimpl
from lorax_core.plugins.spec import BackendSpec


@hookimpl
def lorax_attention_backends() -> Iterable[BackendSpec]:
    """The reference in plain torch, which runs everywhere that torch runs."""
    yield BackendSpec(
        name="torch",
        summary="Reference in plain torch; the oracle of every other backend.",
        backend="lorax_core.attention.torch:TorchBackend",
        device_types=("cpu", "cuda"),
        # The lowest of all, so any plugin's backend that supports the model is tried before it.
        priority=0,
    )
