"""The events of a call, one by one.

Decides that leaving a stream early cancels what it has not finished, and that one consumer at a time waits for an event. Knows
nothing of how updates become events.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from lorax_core.errors import RequestError
from lorax_core.serving.call import Call
from lorax_core.types import Event


class Stream:
    """Events of a call as they happen: iterate with `for` or `async for`. `close()`, dropping it, or cancelling the task that
    iterates it cancels the rest, also where that task is cancelled between two events. Another thread or task may go on with
    it; one that asks while the first still waits gets a RequestError.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._closed = False
        self._waiting = threading.Lock()  # held while somebody waits for an event
        self._task: weakref.ref[asyncio.Task[object]] | None = None  # the task that last asked for an event

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        event = None
        if not self._closed:
            with self._one_consumer():
                try:
                    event = self._call.next_event()
                except BaseException:  # an error of the call, or an interruption: nothing follows
                    self._close_here()
                    raise
        if event is None:
            # Ended by itself: set here so that close() does not cancel a finished call.
            self._closed = True
            raise StopIteration
        return event

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        event = None
        if not self._closed:
            with self._one_consumer():
                self._follow_task()
                try:
                    event = await self._call.next_event_async()
                except BaseException:  # the task was cancelled, or an error of the call
                    self._close_here()
                    raise
        if event is None:
            self._closed = True
            raise StopAsyncIteration
        return event

    def close(self) -> None:
        """Cancel what has not finished; its pages are free before the engine's next step. Idempotent."""
        if not self._closed:
            self._closed = True
            self._call.cancel()

    @contextmanager
    def _one_consumer(self) -> Iterator[None]:
        # Of two that wait, either would get some of the events, and one of them none of the rest.
        if not self._waiting.acquire(blocking=False):
            raise RequestError(
                "another thread or task waits for the next event of this stream",
                hint="give each consumer its own engine.stream(...), or hand events on from one of them",
            )
        try:
            yield
        finally:
            self._waiting.release()

    def _close_here(self) -> None:
        """Close, where that is possible: a forked child may not, and must be able to end."""
        if self._call.here:
            self.close()

    def _follow_task(self) -> None:
        """Close the stream when the current task ends by cancellation, unless another task has taken it over."""
        task = asyncio.current_task()
        if task is None or (self._task is not None and self._task() is task):
            return
        # Weak on both sides: a stream must not keep a finished task and its result alive.
        self._task = weakref.ref(task)
        followed = weakref.ref(self)  # a task must not keep a stream alive that nothing else holds

        def ended(task: asyncio.Task[object]) -> None:
            stream = followed()
            # A task that was cancelled between two events never enters __anext__ again, so nothing there would notice.
            if stream is not None and task.cancelled() and stream._task is not None and stream._task() is task:
                stream.close()

        task.add_done_callback(ended)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._close_here()
