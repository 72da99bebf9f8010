"""What a plugin's declaration imports, and nothing more: specs, the hook marker and the tasks. Never torch."""

from lorax_core.plugins.hookspecs import hookimpl
from lorax_core.plugins.spec import ArchitectureSpec, BackendSpec
from lorax_core.types import Task

__all__ = ["ArchitectureSpec", "BackendSpec", "Task", "hookimpl"]
