"""What the names of adapters mean.

Decides which adapter a name stands for, and which names are forgotten: those that requests brought by naming a source are
bounded, and the least recently used goes. Knows nothing of devices or files. Not thread-safe: the store has the lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lorax_core.adapters.residency.handle import AdapterHandle
from lorax_core.adapters.residency.source import FoundAdapter
from lorax_core.errors import AdapterError, listed, nearest


def check_name(name: object) -> None:
    """Raises AdapterError for what cannot name an adapter: names go into logs, headers and terminals."""
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise AdapterError(
            f"an adapter's name must be a non-empty string of printable characters, not {name!r:.200}",
            hint="load('name', source)",
            http_hint="give it a name of printable characters",
        )


@dataclass(frozen=True, slots=True)
class Named:
    """The adapter of a name. `fetched`: a request named its source, and nobody loaded it."""

    handle: AdapterHandle
    found: FoundAdapter
    pinned: bool = False
    fetched: bool = False


class NameTable:
    """Adapters by name; at most `max_fetched` of them are there because a request named their source."""

    def __init__(self, max_fetched: int) -> None:
        self._max_fetched = max_fetched
        self._named: dict[str, Named] = {}  # fetched ones in the order of their last use

    def __contains__(self, name: object) -> bool:
        return name in self._named

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._named))

    @property
    def items(self) -> list[tuple[str, Named]]:
        """What all names mean, by name; one adapter may have several."""
        return sorted(self._named.items(), key=lambda item: item[0])

    @property
    def handles(self) -> dict[str, AdapterHandle]:
        """All adapters that have a name, by identity."""
        return {one.handle.identity: one.handle for one in self._named.values()}

    def is_pinned(self, handle: AdapterHandle) -> bool:
        """Whether a name of the adapter keeps it on the device."""
        return any(one.pinned for one in self._named.values() if one.handle is handle)

    def find(self, name: str) -> Named:
        """What a name means; raises AdapterError with the nearest name when it means nothing."""
        found = self._named.get(name) if isinstance(name, str) else None
        if found is None:
            close = nearest(str(name)[:200], self._named)
            raise AdapterError(
                f"no adapter is called {name!r:.200}; loaded are {listed(self)}",
                hint=f"did you mean {close!r}?" if close else "load it with engine.adapters.load(name, folder)",
                http_hint=f"did you mean {close!r}?" if close else "GET /v1/models lists the names",
            )
        if found.fetched:
            self._named[name] = self._named.pop(name)
        return found

    def put(self, name: str, named: Named) -> list[Named]:
        """Let a name mean an adapter; gives what no name of theirs means any more."""
        gone = [before] if (before := self._named.pop(name, None)) is not None else []
        self._named[name] = named
        fetched = [name for name, one in self._named.items() if one.fetched]
        return gone + [self._named.pop(oldest) for oldest in fetched[: max(len(fetched) - self._max_fetched, 0)]]

    def remove(self, name: str) -> Named:
        """Forget a name; raises as `find` does."""
        found = self.find(name)
        del self._named[name]
        return found
