"""Event loops that wait for a step, each woken once for all that it brought.

Decides when a thread that steps wakes the event loops of callers. Waking one is a system call, during which its thread takes
the interpreter: done for every answer of a step, the step would wait as often. Knows nothing of answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterable, Iterator

_Events = dict[asyncio.AbstractEventLoop, list[asyncio.Event]]
_held = threading.local()  # `events` while a thread collects them


@contextlib.contextmanager
def woken_together() -> Iterator[None]:
    """What this thread wakes meanwhile is woken at the end, with one call for each event loop."""
    events: _Events = {}
    _held.events = events
    try:
        yield
    finally:
        _held.events = None
        for loop, waiting in events.items():
            _set(loop, waiting)


def wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Set an event of an event loop, from any thread."""
    events: _Events | None = getattr(_held, "events", None)
    if events is None:
        _set(loop, [event])
    else:
        events.setdefault(loop, []).append(event)


def _set(loop: asyncio.AbstractEventLoop, events: Iterable[asyncio.Event]) -> None:
    # asyncio.Event is not thread-safe: only its own loop may set it. RuntimeError: that was closed, so nothing waits in it.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(_set_all, events)


def _set_all(events: Iterable[asyncio.Event]) -> None:
    for event in events:
        event.set()
