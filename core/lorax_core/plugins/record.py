"""The status of one plugin.

Decides the six statuses and the one line that explains a cause. Knows nothing of how plugins are found or validated.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePath
from types import TracebackType
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

from lorax_core.errors import LoraxError, sentence
from lorax_core.plugins.spec import ArchitectureSpec, BackendSpec
from lorax_core.settings import canonical

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

# Frames of this package are core's, so an error is located at the plugin's own line.
_HERE: Final = PurePath(__file__).parent
_MACHINERY: Final = frozenset({"importlib", "pluggy", "pydantic"})  # their frames are not the plugin's

Spec = ArchitectureSpec | BackendSpec


class PluginStatus(StrEnum):
    """The status of an installed plugin.

    - `ready`: usable.
    - `slow-import`: usable, but importing its declaration imported torch.
    - `incompatible`: written for another version of lorax-core or of the plugin API; it is not used.
    - `conflict`: it claims a name that another plugin claims too; neither gets it until the user names one.
    - `broken`: its import, its hooks or its declarations failed.
    - `blocked`: disabled by the user's settings; it was not imported.
    """

    READY = "ready"
    SLOW_IMPORT = "slow-import"
    INCOMPATIBLE = "incompatible"
    CONFLICT = "conflict"
    BROKEN = "broken"
    BLOCKED = "blocked"

    @property
    def failed(self) -> bool:
        """Whether something must be fixed before all that the plugin declares can be used."""
        return self in (PluginStatus.INCOMPATIBLE, PluginStatus.CONFLICT, PluginStatus.BROKEN)


@dataclass(frozen=True, slots=True)
class PluginRecord:
    """One entry point of the group `lorax.plugins`, and its status.

    `architectures` and `backends` are what can be used; `contested` is what it declares but does not get, because
    another plugin claims the same name. `seconds` is how long importing and asking it took, None if it was not imported.
    """

    # from the distribution's metadata
    name: str
    package: str
    version: str
    module: str
    # from trying it
    status: PluginStatus
    cause: str | None = None
    hint: str | None = None
    # Kept with its traceback, so that the PluginError raised later can chain to it.
    exception: BaseException | None = None
    seconds: float | None = None
    # from its hooks
    architectures: tuple[ArchitectureSpec, ...] = ()
    backends: tuple[BackendSpec, ...] = ()
    # from the host
    contested: tuple[Spec, ...] = ()

    @property
    def specs(self) -> tuple[Spec, ...]:
        """All of its specs that can be used."""
        return (*self.architectures, *self.backends)

    @property
    def title(self) -> str:
        """The plugin in a message: `lorax-bert 0.1.0`, with the entry point's name where that says more."""
        # A package with several entry points would otherwise have several plugins of one title.
        named = canonical(self.name) in self.package
        return f"{self.package} {self.version}".rstrip() + ("" if named else f" (plugin {self.name!r})")

    @property
    def verdict(self) -> str:
        """The status as a sentence."""
        word = "in conflict" if self.status is PluginStatus.CONFLICT else self.status
        return f"plugin {self.title} is {word}" + (f": {self.cause}" if self.cause else "")


def explain(error: BaseException) -> str:
    """What went wrong, on one line, with the place in the plugin where it is known."""
    if isinstance(error, LoraxError):
        return " ".join(error.message.split())
    if isinstance(error, ValidationError):
        fields = "; ".join(_field(item) for item in error.errors(include_url=False))
        return f"{error.title}: {fields}{_place(error.__traceback__)}"
    try:
        # __str__ is the plugin's code as well, and may raise.
        text = " ".join(str(error).split())
    except Exception:
        text = "<its message cannot be printed>"
    kind = type(error).__name__
    return (f"{kind}: {text}" if text else kind) + _place(error.__traceback__)


def _field(item: ErrorDetails) -> str:
    where = ".".join(str(part) for part in item["loc"])
    return f"{where}: {sentence(item)}" if where else sentence(item)


def _place(traceback: TracebackType | None) -> str:
    place = ""
    # The last frame that is neither core's nor the machinery's wins: the innermost of the plugin.
    # Names like <string> or <frozen importlib> are no files.
    while traceback is not None:
        file = PurePath(traceback.tb_frame.f_code.co_filename)
        if file.parent != _HERE and not _MACHINERY.intersection(file.parts) and not file.name.startswith("<"):
            place = f" (at {file.parent.name}/{file.name}:{traceback.tb_lineno})"
        traceback = traceback.tb_next
    return place
