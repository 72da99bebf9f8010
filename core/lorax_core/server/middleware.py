"""What happens to every request before a route sees it, and to its answer.

Decides that each request has an id and a line in the log, that keys are checked before a body is read, and that a body is
bounded in size and in time. Knows nothing of what bodies hold.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorax_core.server.auth import ApiKeys
from lorax_core.server.errors import Failure, Refused, body_of, failure
from lorax_core.server.gateway import ClientGone
from lorax_core.server.logs import log, log_failure, new_request_id, request_id
from lorax_core.server.metrics import Metrics
from lorax_core.server.options import ServerOptions
from lorax_core.server.tracing import Traces

_DOCUMENT: Final = "/openapi.json"
"""The one route that is not of FastAPI's own kind, which are in a request's scope."""
_BODIES: Final = 32
"""How many bodies of the largest size a server has room for, whatever their number: each client may send one at once."""


def refusal(path: str, found: Failure) -> Response:
    """The answer to a request that failed, in the shape of the API that `path` belongs to."""
    status, body = body_of(path, found)
    # In ASCII: what it names of the request may be half a surrogate pair, which UTF-8 does not have.
    return Response(json.dumps(body), status, found.headers, "application/json")


class EveryRequest:
    """Id, key, bounds of the body and log line of every request; whatever escapes from a route becomes an answer."""

    def __init__(self, app: ASGIApp, *, options: ServerOptions, metrics: Metrics, traces: Traces | None = None) -> None:
        self._app, self._options, self._metrics, self._traces = app, options, metrics, traces
        self._keys = ApiKeys(options.api_keys, options.admin_key)
        self._held = _Held(_BODIES * options.max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        found = new_request_id(headers.get("x-request-id"))
        token = request_id.set(found)
        span = None if self._traces is None else self._traces.begin(scope["method"], headers)
        answer = _Reply(send, found, time.monotonic())
        body = _Body(receive, headers, self._options, self._held)
        try:
            self._keys.check(scope["method"], scope["path"], headers.get("authorization"))
            body.check_length()
            await self._app(scope, body, answer.send)
        except ClientGone:
            answer.status = answer.status or 499  # nginx's number for a client that did not wait
        except Exception as error:
            said = failure(error)
            log_failure(said, error)
            if answer.status is None:
                self._metrics.refused(said.kind)
                await refusal(scope["path"], said)(scope, receive, answer.send)
            else:  # part of the answer is out: only an end of the connection tells that it is not whole
                raise
        finally:
            body.let_go()
            route = self._note(scope, answer)
            if span is not None and self._traces is not None:
                self._traces.end(span, scope["method"], route, answer.status or 499)
            request_id.reset(token)

    def _note(self, scope: Scope, answer: _Reply) -> str:
        """Count and log an answer; gives its route."""
        seconds = time.monotonic() - answer.start
        # By the route and not by the path, which a client chooses.
        route = getattr(scope.get("route"), "path", None) or (_DOCUMENT if scope["path"] == _DOCUMENT else "(none)")
        self._metrics.answered(route, answer.status or 499, seconds)
        fields: dict[str, Any] = {
            "method": scope["method"],
            "route": route,
            "status": answer.status or 499,
            "seconds": round(seconds, 4),
            "request_id": answer.request_id,
        }
        quiet = route in ("/health", "/ready", "/metrics", "/stats") and answer.status == 200
        log.log(10 if quiet else 20, "request", extra={"fields": fields})
        return str(route)


class _Reply:
    """Passes an answer on, with the request's id among its headers, and remembers its status."""

    def __init__(self, send: Send, found: str, start: float) -> None:
        self.status: int | None = None
        self.request_id, self.start = found, start
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.request_id
            headers.setdefault("Cache-Control", "no-store")
        await self._send(message)


@dataclass(slots=True)
class _Held:
    """Bytes of the bodies of all requests that are not answered."""

    limit: int
    bytes: int = 0


class _Body:
    """A request's `receive`, which gives up on a body that is too large or too slow, or one too many."""

    def __init__(self, receive: Receive, headers: Headers, options: ServerOptions, held: _Held) -> None:
        self._receive, self._options, self._held = receive, options, held
        self._length = headers.get("content-length", "")
        self._size = 0
        self._whole = False
        self._deadline: float | None = None

    def check_length(self) -> None:
        """Refuse what is too large by its header, before any of it is read. A wrong number is found out by what comes."""
        if self._length.isdecimal() and int(self._length[:20]) > self._options.max_body_bytes:
            raise self._too_large()

    def let_go(self) -> None:
        """Nobody holds the body any more."""
        self._held.bytes -= self._size

    async def __call__(self) -> Message:
        if self._whole:  # what comes now is that the client hangs up, at any time
            return await self._receive()
        loop = asyncio.get_running_loop()
        self._deadline = self._deadline or loop.time() + self._options.body_timeout
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            raise Refused(
                "slow_body",
                f"the body did not arrive within {self._options.body_timeout:g} seconds",
                hint="send it at once; --body-timeout allows more",
            ) from error
        self._count(len(message.get("body", b"")))
        self._whole = not message.get("more_body", False)
        return message

    def _count(self, size: int) -> None:
        self._size += size
        self._held.bytes += size
        if self._size > self._options.max_body_bytes:
            raise self._too_large()
        if self._held.bytes > self._held.limit:
            raise Refused(
                "overloaded",
                f"the bodies of requests that are not answered have {self._held.limit:,} bytes, and may not have more",
                hint="try again later, or send less at once",
                retry_after=1,
            )

    def _too_large(self) -> Refused:
        return Refused(
            "too_large",
            f"a body may have {self._options.max_body_bytes:,} bytes",
            hint="send less at once, or start the server with a larger --max-body-bytes",
        )
