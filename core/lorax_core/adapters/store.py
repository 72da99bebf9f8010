"""The adapters of one engine, by name.

Decides what a name means now. Two names for one content share one bound adapter; unloading forgets a name, while rows in
flight keep the object that they started with.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorax_core.adapters.base import Adapter
from lorax_core.adapters.head import HeadRequest
from lorax_core.adapters.lora import LoraAdapter
from lorax_core.errors import AdapterError, listed, nearest
from lorax_core.weights.loader import LoadedModel


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What the store tells of a loaded adapter. `targets` are module paths of the base; `nbytes` is on the device."""

    name: str
    kind: str
    identity: str
    source: str
    task: str | None
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    nbytes: int


class AdapterStore:
    """Named adapters, bound to one base. Safe to call from any thread."""

    def __init__(self, base: LoadedModel) -> None:
        self._base = base
        self._adapters: dict[str, LoraAdapter] = {}
        self._lock = threading.Lock()

    def load(
        self,
        name: str,
        source: str | Path,
        *,
        task: str | None = None,
        problem_type: str | None = None,
        id2label: Mapping[int, str] | None = None,
    ) -> AdapterInfo:
        """Read, check and bind the adapter in `source` under `name`, replacing what had that name.

        `task`, `problem_type` and `id2label` say of its head what its files do not; unnamed labels are `LABEL_i`.
        Raises AdapterError, with the engine unharmed, when the files are bad or do not fit the base.
        """
        if not isinstance(name, str) or not name.strip():
            raise AdapterError(f"an adapter's name must be a non-empty string, not {name!r}")
        adapter = LoraAdapter(source, HeadRequest.of(task, problem_type, id2label))
        with self._lock:
            twin = next((a for a in self._adapters.values() if a.identity == adapter.identity), None)
        if twin is None:
            adapter.bind(self._base)
        with self._lock:
            self._adapters[name] = twin or adapter
            return self._info(name)

    def unload(self, name: str) -> None:
        """Forget `name`; raises AdapterError when nothing is called so."""
        with self._lock:
            self._find(name)
            del self._adapters[name]

    def list(self) -> list[AdapterInfo]:
        """What is loaded, by name."""
        with self._lock:
            return [self._info(name) for name in sorted(self._adapters)]

    def get(self, name: str) -> Adapter:
        """The adapter called `name` now; raises AdapterError with the nearest name."""
        with self._lock:
            return self._find(name)

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._adapters))

    def _find(self, name: str) -> LoraAdapter:
        found = self._adapters.get(name)
        if found is None:
            close = nearest(str(name), self._adapters)
            raise AdapterError(
                f"no adapter is called {name!r}; loaded are {listed(sorted(self._adapters))}",
                hint=f"did you mean {close!r}?" if close else "load it with engine.adapters.load(name, folder)",
            )
        return found

    def _info(self, name: str) -> AdapterInfo:
        adapter = self._adapters[name]
        return AdapterInfo(
            name=name,
            kind=adapter.kind,
            identity=adapter.identity,
            source=str(adapter.path),
            task=adapter.task.value if adapter.task is not None else None,
            ranks=adapter.ranks,
            targets=adapter.targets,
            nbytes=adapter.nbytes,
        )
