"""Which backend an engine uses.

Decides by asking each declared backend in order of priority, and remembers why the others were passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lorax_core.attention.base import AttentionBackend, AttentionSpec, CacheLayout
from lorax_core.errors import LoraxError, RequestError, listed, nearest
from lorax_core.plugins.resolve import load_class
from lorax_core.plugins.spec import BackendSpec


@dataclass(frozen=True)
class Selection:
    """The chosen backend, the cache that it needs, and for each one passed over its name and the reason."""

    backend: AttentionBackend
    layout: CacheLayout
    passed_over: tuple[tuple[str, str], ...]


def select_backend(
    declared: Sequence[BackendSpec],
    specs: Sequence[AttentionSpec],
    *,
    dtype: torch.dtype,
    device: str,
    kv_dtype: torch.dtype | None = None,
    page_size: int | None = None,
    name: str | None = None,
    verify: Callable[[BackendSpec, CacheLayout], str | None] | None = None,
) -> Selection:
    """The first declared backend that supports every layer, or the one called `name`.

    `kv_dtype` None stores keys and values in `dtype`; `page_size` None leaves it to the backend. `verify` says why a backend
    that supports the model is not to be used after all. Raises RequestError when `name` is unknown or cannot serve the model,
    with the reason.
    """
    check_backend_name(declared, name)
    passed: list[tuple[str, str]] = []
    for spec in declared:
        if name is not None and spec.name != name:
            continue
        backend_class, reason = _available(spec, torch.device(device).type)
        if backend_class is None:
            passed.append((spec.name, reason))
            continue
        try:
            backend = backend_class()
            layout = backend.layout(specs, dtype, kv_dtype or dtype, torch.device(device).type, page_size)
        except Exception as error:  # a backend that is broken must not keep the others from being used
            layout = f"its layout() failed: {type(error).__name__}: {error}"
        if isinstance(layout, CacheLayout) and verify is not None:
            layout = verify(spec, layout) or layout
        if isinstance(layout, CacheLayout):
            return Selection(backend, layout, tuple(passed))
        passed.append((spec.name, layout or "it gives no reason"))
    reasons = "; ".join(f"{backend_name}: {reason}" for backend_name, reason in passed)
    if name is not None:
        raise RequestError(
            f"attention backend {name!r} cannot serve this model on {device!r}: {passed[0][1]}",
            hint="leave the backend out, and the first that can be used is taken; `lorax doctor` lists them, and "
            "`lorax doctor --verify` tries their kernels again",
        )
    raise RequestError(
        f"no attention backend supports this model on {device!r}: {reasons}",
        hint="`lorax doctor` lists the backends of this machine; the backend 'torch' supports most on a CPU",
    )


def check_backend_name(declared: Sequence[BackendSpec], name: str | None) -> None:
    """Raise RequestError, with the nearest name, when the named backend is not registered."""
    if name is None or name in {spec.name for spec in declared}:
        return
    close = nearest(name, [spec.name for spec in declared])
    raise RequestError(
        f"no attention backend is called {name!r}; there are {listed(spec.name for spec in declared)}",
        hint=f"did you mean {close!r}?" if close else "leave attention out: the first that can be used is taken",
    )


def check_usable(declared: Sequence[BackendSpec], name: str | None, device: str) -> None:
    """Raise RequestError when the backend called `name` is unknown, or can be used for no model at all on a device."""
    check_backend_name(declared, name)
    for spec in declared:
        reason = why_not(spec, device) if spec.name == name else None
        if reason is not None:
            raise RequestError(
                f"attention backend {name!r} cannot be used on {device!r}: {reason}",
                hint="leave attention out, and the first that can be used is taken; `lorax doctor` lists them",
            )


def why_not(spec: BackendSpec, device: str) -> str | None:
    """Why a declared backend can be used for no model at all on a device; None when it can for some."""
    found, reason = _available(spec, torch.device(device).type)
    return reason if found is None else None


def _available(spec: BackendSpec, kind: str) -> tuple[type[AttentionBackend] | None, str]:
    if kind not in spec.device_types:
        return None, f"runs on {listed(spec.device_types)}, not on {kind!r}"
    try:
        backend_class = load_class(spec.backend, None)
    except LoraxError as error:  # a plugin's backend that cannot be imported must not keep the others from being used
        return None, error.message
    if not issubclass(backend_class, AttentionBackend):
        return None, f"{spec.backend} is not an AttentionBackend"
    try:
        available, why = backend_class.is_available()
    except Exception as error:
        return None, f"its is_available() failed: {type(error).__name__}: {error}"
    return (backend_class, "") if available else (None, why)
