"""Answers that come piece by piece, as server-sent events.

Decides how pieces are sent, and that a stream ends when its client hangs up, at once. Knows nothing of what pieces hold.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lorax_core.server.gateway import Events, until_gone

# Once: `json.dumps` makes an encoder at each call that says how.
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def encoded(value: Any) -> bytes:
    """A value as JSON."""
    return _ENCODER.encode(value).encode()


def data(value: Any) -> bytes:
    """One event that holds a JSON value."""
    return b"data: " + encoded(value) + b"\n\n"


class EventStream(Response):
    """Sends what `lines` gives; when the client hangs up, or reads nothing until the deadline, `events` is closed.

    What goes wrong on the way is the last event, made by `failed`: the status was sent long before.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: Events, lines: AsyncGenerator[bytes, None], failed: Callable[[BaseException], bytes]
    ) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.headers["X-Accel-Buffering"] = "no"  # or nginx collects events before it passes them on
        self._events, self._lines, self._failed = events, lines, failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The whole answer."""
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            async with asyncio.timeout_at(self._events.deadline + 1.0):  # first the deadline of the answer itself
                await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:  # the client does not read
            pass
        finally:
            over = sending.done()
            gone.cancel()
            sending.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            await self._lines.aclose()
            self._events.close()
        if over:
            sending.result()
        else:
            self._events.hung_up()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for line in self._lines:
                await send({"type": "http.response.body", "body": line, "more_body": True})
        except Exception as error:
            self._events.failed(error)
            await send({"type": "http.response.body", "body": self._failed(error), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
