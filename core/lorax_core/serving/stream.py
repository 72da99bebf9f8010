"""The events of a call, one by one.

Decides that leaving a stream early cancels what it has not finished. Knows nothing of how updates become events.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from lorax_core.serving.call import Call
from lorax_core.types import Event


class Stream:
    """Events of a call as they happen: iterate with `for` or `async for`. `close()`, dropping it, or cancelling the task that
    iterates it cancels the rest.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._closed = False

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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
