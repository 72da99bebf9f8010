"""The hooks that a plugin may implement.

Decides their names and signatures. Both return data, so a hook that fails half-way leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import pluggy

from lorax_core.plugins.spec import ArchitectureSpec, BackendSpec

PROJECT: Final = "lorax"
"""Name under which pluggy keeps the marks of `hookspec` and `hookimpl`."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of `plugin.py` as the hook of its name, `lorax_architectures` or `lorax_attention_backends`."""


@hookspec
def lorax_architectures() -> Iterable[ArchitectureSpec]:  # type: ignore[empty-body]
    """The architectures that this plugin provides."""


@hookspec
def lorax_attention_backends() -> Iterable[BackendSpec]:  # type: ignore[empty-body]
    """The attention backends that this plugin provides."""
