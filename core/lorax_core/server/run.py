"""A server on a socket, until a signal ends it.

Decides how connections that say nothing are dropped, and in which order a server stops: it refuses what is new, finishes what
runs, and ends. Knows nothing of routes.
"""

from __future__ import annotations

import asyncio
import gc
import socket
from typing import Any, Final

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lorax_core.errors import RequestError
from lorax_core.server.app import build_app
from lorax_core.server.logs import set_up_logs
from lorax_core.server.options import ServerOptions
from lorax_core.serving.engine import Engine

_BACKLOG: Final = 2_048
_HEADER_BYTES: Final = 64 * 1024
"""Bytes that a request line and its headers may have."""
_KEEP_ALIVE: Final = 75
"""Seconds that a connection may be idle between two requests, more than the 60 of most proxies."""


def listen(options: ServerOptions) -> socket.socket:
    """The socket, bound: before anything is loaded, so that a port which is taken is known at once.

    Raises RequestError where that cannot be.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((options.host, options.port))
    except (OSError, UnicodeError) as error:
        found.close()
        raise RequestError(
            f"cannot listen on {options.host} port {options.port}: {getattr(error, 'strerror', None) or error}",
            hint="--port 0 takes a free one; --host 127.0.0.1 is this machine, 0.0.0.0 all of its addresses",
        ) from error
    return found


def address(bound: socket.socket) -> str:
    """Where clients find a bound socket."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # compared, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(engine: Engine, options: ServerOptions, bound: socket.socket, *, model_name: str | None = None) -> None:
    """Answer on the socket until SIGINT or SIGTERM; for the main thread of a process that is a server.

    Then running requests have `drain_timeout` seconds to finish. The engine stays the caller's to close.
    """
    set_up_logs(options.log_format)
    app = build_app(engine, options, model_name=model_name)
    # What is loaded stays: the collector of garbage would otherwise look through it again and again.
    gc.collect()
    gc.freeze()
    make_server(app, options).run(sockets=[bound])


def make_server(app: FastAPI, options: ServerOptions) -> uvicorn.Server:
    """The server of an application; `run(sockets=[...])` answers."""

    class Protocol(_Impatient):
        patience = options.body_timeout

    return _Draining(
        app.state.gateway,
        uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=int(options.drain_timeout) or None,
        ),
    )


class _Draining(uvicorn.Server):
    """Says that it drains as soon as a signal came."""

    def __init__(self, gateway: Any, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._gateway = gateway

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A signal: the first one drains, a second one ends."""
        self._gateway.draining = True
        super().handle_exit(sig, frame)


class _Impatient(HttpToolsProtocol):
    """Closes connections whose request line and headers do not arrive in time, or do not end."""

    patience: float

    def connection_made(self, transport: Any) -> None:
        """A client connected."""
        self._unheard = 0  # bytes of headers that are not whole
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = self.loop.call_later(self.patience, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """A client went away."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes came."""
        super().data_received(data)
        if not self._waits:
            self._unheard = 0
            return
        self._unheard += len(data)
        if self._unheard > _HEADER_BYTES:
            self.transport.close()
        elif self._timer is None:  # of a second request on this connection
            self._timer = self.loop.call_later(self.patience, self._late)

    @property
    def _waits(self) -> bool:
        """Whether a request's headers are still to come, and none is answered."""
        return self.cycle is None or self.cycle.response_complete

    def _late(self) -> None:
        self._timer = None
        # A connection that sends nothing after an answer is uvicorn's to close.
        if self._waits and (self.cycle is None or self._unheard) and not self.transport.is_closing():
            self.transport.close()
