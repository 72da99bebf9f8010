"""Which backend an engine uses.

Decides by asking each declared backend in order of priority, and remembers why the others were passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorax_core.attention.base import AttentionBackend, AttentionSpec
from lorax_core.errors import RequestError, listed, nearest
from lorax_core.plugins.resolve import load_class
from lorax_core.plugins.spec import BackendSpec


@dataclass(frozen=True)
class Selection:
    """The chosen backend, and for each one passed over its name and the reason."""

    backend: AttentionBackend
    passed_over: tuple[tuple[str, str], ...]


def select_backend(
    declared: Sequence[BackendSpec],
    specs: Sequence[AttentionSpec],
    *,
    page_size: int,
    dtype: torch.dtype,
    device: str,
    name: str | None = None,
) -> Selection:
    """The first declared backend that serves every layer, or the one called `name`.

    Raises RequestError when `name` is unknown or cannot serve the model, with the reason.
    """
    if name is not None and name not in {spec.name for spec in declared}:
        close = nearest(name, [spec.name for spec in declared])
        raise RequestError(
            f"no attention backend is called {name!r}; there are {listed(spec.name for spec in declared)}",
            hint=f"did you mean {close!r}?" if close else None,
        )
    passed: list[tuple[str, str]] = []
    for spec in declared:
        if name is not None and spec.name != name:
            continue
        backend, reason = _try(spec, specs, page_size, dtype, device)
        if backend is not None:
            return Selection(backend, tuple(passed))
        passed.append((spec.name, reason))
    told = "; ".join(f"{backend_name}: {reason}" for backend_name, reason in passed)
    raise RequestError(f"no attention backend serves this model on {device!r}: {told}")


def _try(
    spec: BackendSpec, specs: Sequence[AttentionSpec], page_size: int, dtype: torch.dtype, device: str
) -> tuple[AttentionBackend | None, str]:
    kind = torch.device(device).type
    backend_class, reason = _available(spec, kind)
    if backend_class is None:
        return None, reason
    backend = backend_class()
    for layer in specs:
        unserved = backend.supports(layer, page_size, dtype, kind)
        if unserved is not None:
            return None, unserved
    return backend, ""


def why_not(spec: BackendSpec, device: str) -> str | None:
    """Why a declared backend serves no model at all on a device; None when it serves some."""
    found, reason = _available(spec, torch.device(device).type)
    return reason if found is None else None


def _available(spec: BackendSpec, kind: str) -> tuple[type[AttentionBackend] | None, str]:
    if kind not in spec.device_types:
        return None, f"runs on {listed(spec.device_types)}, not on {kind!r}"
    backend_class = load_class(spec.backend, None)
    if not issubclass(backend_class, AttentionBackend):
        return None, f"{spec.backend} is not an AttentionBackend"
    available, why = backend_class.is_available()
    return (backend_class, "") if available else (None, why)
