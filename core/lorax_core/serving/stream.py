"""The events of a call, one by one.

Decides that leaving a stream early cancels what it has not finished. Knows nothing of how updates become events.
"""

from __future__ import annotations

import asyncio
import weakref
from types import TracebackType
from typing import Self

from lorax_core.serving.call import Call
from lorax_core.types import Event


class Stream:
    """Events of a call as they happen: iterate with `for` or `async for`. `close()`, dropping it, or cancelling the task that
    iterates it cancels the rest, also where that task is cancelled between two events.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._closed = False
        self._task: weakref.ref[asyncio.Task[object]] | None = None  # the task that last asked for an event

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        event = None
        if not self._closed:
            try:
                event = self._call.next_event()
            except BaseException:  # an error of the call, or an interruption: nothing follows
                self.close()
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
            self._follow_task()
            try:
                event = await self._call.next_event_async()
            except BaseException:  # the task was cancelled, or an error of the call
                self.close()
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
        self.close()
