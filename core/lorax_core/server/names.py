"""What clients call the base and its adapters.

Decides what the `model` of a request means: the base, an adapter, or `base:adapter`. Knows nothing of what adapters are.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from lorax_core.adapters.residency.store import AdapterStore
from lorax_core.errors import AdapterError, RequestError, listed, nearest
from lorax_core.server.errors import Refused

BASE: Final = "__base_model__"
"""What LoRAX's clients call the base."""


def base_name(checkpoint: str) -> str:
    """What a base is called that nobody gave a name: as its hub id, or as its folder, without where that is."""
    path = Path(checkpoint).expanduser()
    return (path.resolve().name or checkpoint) if path.is_dir() else checkpoint


class ModelNames:
    """The names of one server's models. `base` is the name of the base; `source`, where it came from, means it too."""

    def __init__(self, base: str, adapters: AdapterStore, *, source: str | None = None) -> None:
        self.base = base
        # The longer one first: one may be the beginning of the other.
        self._bases = sorted({base, source or base}, key=len, reverse=True)
        self._adapters = adapters
        for name in adapters:
            if not self.free(name):
                raise RequestError(
                    f"an adapter is called {name!r:.200}, which means the base",
                    hint="give it another name, or the base another one with --model-name",
                )

    def free(self, name: str) -> bool:
        """Whether an adapter may have this name: it can be shown, and does not mean the base."""
        return bool(name.strip()) and name.isprintable() and name not in (*self._bases, BASE)

    def adapter(self, model: str | None, *, param: str = "model") -> str | None:
        """The adapter that `model` means, None for the base; raises Refused (404) with the nearest name.

        A source that is not loaded yet ("org/name") is an adapter too, where `adapter_sources` allows it.
        """
        if model is None or model in ("", *self._bases):
            return None
        # An adapter may be called like the beginning of another name: its own name comes first.
        wanted = model
        base = next((one for one in self._bases if model.startswith(f"{one}:")), None)
        if base is not None and model not in self._adapters:
            wanted = model.removeprefix(f"{base}:")
        self.check((wanted,), param=param)
        return wanted

    def check(self, adapters: Iterable[str], *, param: str) -> None:
        """Raises Refused (404) for adapters that are not there, or may not be named by a request."""
        for name in adapters:
            try:
                self._adapters.missing(name)
            except AdapterError as error:
                known = [self.base, *self._adapters]
                close = nearest(name, known)
                raise Refused(
                    "no_model",
                    f"there is no model or adapter {name!r:.200}; there are {listed(known)}",
                    hint=f"did you mean {close!r}?"
                    if close
                    else "GET /v1/models lists them; --adapter-sources allows others",
                    param=param,
                ) from error

    def all(self) -> list[str]:
        """The base, then the adapters by name."""
        return [self.base, *self._adapters]
