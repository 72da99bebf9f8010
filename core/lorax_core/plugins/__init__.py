"""What a plugin's `plugin.py` and `cases.py` import: specs, cases, the hook marker and the tasks. Never imports torch."""

from lorax_core.plugins.cases import ArchitectureCases
from lorax_core.plugins.hookspecs import hookimpl
from lorax_core.plugins.spec import ArchitectureSpec, BackendSpec
from lorax_core.types import Task

__all__ = ["ArchitectureCases", "ArchitectureSpec", "BackendSpec", "Task", "hookimpl"]
