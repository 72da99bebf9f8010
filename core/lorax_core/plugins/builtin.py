"""Core's own plugin: the attention backends that ship with lorax-core, declared as a stranger would declare his."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_core.plugins.hookspecs import hookimpl
from lorax_core.plugins.spec import BackendSpec


@hookimpl
def lorax_attention_backends() -> Iterable[BackendSpec]:
    """The readable reference, which runs everywhere that torch runs."""
    yield BackendSpec(
        name="torch",
        summary="Reference in plain torch; the oracle of every other backend.",
        backend="lorax_core.attention.torch:TorchBackend",
        device_types=("cpu", "cuda"),
        priority=0,
    )
