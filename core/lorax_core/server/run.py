"""A server on a socket, until a signal ends it.

Decides how connections that say nothing are dropped, and in which order a server stops: it refuses what is new, finishes what
runs, and ends. Knows nothing of routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any, Final

import httptools
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lorax_core.errors import RequestError
from lorax_core.server.app import build_app
from lorax_core.server.logs import set_up_logs
from lorax_core.server.names import base_name as base_name
from lorax_core.server.options import ServerOptions
from lorax_core.server.tracing import traces_from_environment
from lorax_core.serving.engine import Engine

_BACKLOG: Final = 2_048
_HEADER_BYTES: Final = 64 * 1024
"""Bytes that a request line and its headers may have, with the trailers of its body."""
_FED: Final = 8 * 1024
"""Bytes that the parser gets at once: it does not say how far it came with what it gave nothing of."""
_PIPELINED: Final = 16
"""Requests that a connection may send before the first of them is answered."""
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
        # Its connections have it too: a client whose machine is gone says nothing, and its answer would be computed.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        found.bind((options.host, options.port))
        # Now: until one of them listens, two servers may bind one port. Who connects meanwhile waits until all is loaded.
        found.listen(_BACKLOG)
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


@contextlib.contextmanager
def serving(engine: Engine, options: ServerOptions | None = None, *, model_name: str | None = None) -> Iterator[str]:
    """A server in a thread of this process, as long as the block runs; gives its address. By default at a free port.

    At the end running requests have `drain_timeout` seconds to finish. The engine stays the caller's to close.
    """
    chosen = options or ServerOptions(port=0)
    bound = listen(chosen)
    with running(build_app(engine, chosen, model_name=model_name), chosen, bound):
        yield address(bound)


@contextlib.contextmanager
def running(app: FastAPI, options: ServerOptions, bound: socket.socket) -> Iterator[uvicorn.Server]:
    """As `serving`, with an application of `build_app` that routes were added to; gives the server."""
    server = make_server(app, options)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, name="lorax-server")
    thread.start()
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join()


def serve(engine: Engine, options: ServerOptions, bound: socket.socket, *, model_name: str | None = None) -> None:
    """Answer on the socket until SIGINT or SIGTERM; for the main thread of a process that is a server.

    Then running requests have `drain_timeout` seconds to finish. The engine stays the caller's to close.
    """
    set_up_logs(options.log_format)
    serve_app(build_app(engine, options, model_name=model_name, traces=traces_from_environment()), options, bound)


def serve_app(app: FastAPI, options: ServerOptions, bound: socket.socket) -> None:
    """As `serve`, with an application of `build_app` that routes were added to."""
    _allow_connections()
    # What is loaded stays: the collector of garbage would otherwise look through it again and again.
    gc.collect()
    gc.freeze()
    make_server(app, options).run(sockets=[bound])


def _allow_connections() -> None:
    """As many open files as the system allows this process: each connection is one, and some systems begin with 1,024."""
    if sys.platform != "win32":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # a limit that the system does not grant after all
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


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
            timeout_graceful_shutdown=math.ceil(options.drain_timeout) + 1,  # first the gateway ends what runs
        ),
    )


class _Draining(uvicorn.Server):
    """Says that it drains as soon as a signal came."""

    def __init__(self, gateway: Any, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._gateway = gateway

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A signal: the first one drains, a second one ends the process as it would have without a server."""
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        # Not uvicorn's own, which raises the signal again once all is done: the process could not end with 0.
        self._gateway.draining = self.should_exit = True
        with contextlib.suppress(RuntimeError):  # before the event loop runs there is nothing to end
            asyncio.get_running_loop().call_soon_threadsafe(self._gateway.drain)


class _LongHeadersError(Exception):
    """More headers than a request may have."""


class _Impatient(HttpToolsProtocol):
    """Closes connections whose request line and headers do not arrive in time, or are too long, and those of clients that
    read nothing of their answer. Speaks HTTP/1.1 to clients that offer another protocol.
    """

    patience: float
    _pending = 0  # bytes since the parser last gave something
    _head = 0  # bytes of the request line, headers and trailers so far

    def connection_made(self, transport: Any) -> None:
        """A client connected."""
        self._unheard = 0  # bytes of headers that are not whole
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = self.loop.call_later(self.patience, self._late)
        self._watch: asyncio.TimerHandle | None = None
        self._unread = 0  # bytes of answers that the client had not taken when they were last counted
        self._asked: list[Any] = []  # requests that are not answered

    def connection_lost(self, exc: Exception | None) -> None:
        """A client went away."""
        self._heard()
        self._unwatch()
        super().connection_lost(exc)
        # uvicorn tells the last one alone.
        for cycle in self._asked:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def on_headers_complete(self) -> None:
        """One more request, perhaps before the one ahead of it is answered."""
        if self.parser.should_upgrade():
            return  # it comes again, from `_as_http`
        super().on_headers_complete()
        self._asked = [cycle for cycle in (*self._asked, self.cycle) if not cycle.response_complete]

    # --- what the client says ---

    def data_received(self, data: bytes) -> None:
        """Some bytes came."""
        self._unset_keepalive_if_required()
        for at in range(0, len(data), _FED):
            if not self._feed(data[at : at + _FED]):
                break
        if len(self._asked) > _PIPELINED:
            self.transport.close()
        elif len(self._asked) > 1 and len(self.cycle.body) < _HEADER_BYTES:
            # uvicorn stops reading where requests wait for the one ahead, and would not see that the client hangs up.
            self.flow.resume_reading()
        if not self._waits:
            self._heard()
            return
        # Of a body that was refused the rest is read and dropped: a client that still sends would not find its answer.
        if not self._drops:
            self._unheard += len(data)
        if self._timer is None and not self.transport.is_closing():  # of a second request on this connection
            self._timer = self.loop.call_later(self.patience, self._late)

    def _feed(self, data: bytes) -> bool:
        """Let the parser read; returns whether it may go on."""
        self._pending += len(data)
        try:
            while data:
                data = self._parsed(data)
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")
            return False
        if self._pending > _HEADER_BYTES:  # of one header, or of none
            self._head = self._pending
            self.send_400_response("")
            return False
        return True

    def _parsed(self, data: bytes) -> bytes:
        """Let the parser read up to the headers of a request that offers another protocol, such as h2c; returns the rest."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stop:
            # This parser takes the body for the other protocol, and uvicorn would read it as the next request.
            again = self._as_http()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn makes its own
            self.parser.feed_data(again)
            return data[stop.args[0] :]
        return b""

    def _as_http(self) -> bytes:
        """The request line and headers that the parser stopped after, without the offer."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise httptools.HttpParserError("this server is not a proxy")
        version = self.parser.get_http_version().encode()
        kept = [b"%b: %b\r\n" % (name, value) for name, value in self.headers if name != b"upgrade"]
        return b"%b %b HTTP/%b\r\n%b\r\n" % (method, self.url, version, b"".join(kept))

    def on_message_complete(self) -> None:
        """All of a request came."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def on_message_begin(self) -> None:
        """One more request."""
        super().on_message_begin()
        self._head = 0

    def on_url(self, url: bytes) -> None:
        """Its path, or a part of it."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or after the body a trailer."""
        super().on_header(name, value)
        self._count(len(name) + len(value) + 4)

    def on_body(self, body: bytes) -> None:
        """A part of its body, which the application bounds."""
        self._pending = 0
        super().on_body(body)

    def _count(self, size: int) -> None:
        self._pending = 0
        self._head += size
        if self._head > _HEADER_BYTES:
            raise _LongHeadersError

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, or has too long headers."""
        if self._head <= _HEADER_BYTES:
            super().send_400_response(msg)
        elif not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            )
            self.transport.close()

    @property
    def _waits(self) -> bool:
        """Whether a request's headers are still to come, and none is answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def _drops(self) -> bool:
        """Whether a request was answered before its body was whole."""
        return self.cycle is not None and self.cycle.response_complete and self.cycle.more_body

    def _heard(self) -> None:
        self._unheard = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        # A connection that sends nothing after an answer is uvicorn's to close.
        if self._waits and (self.cycle is None or self._unheard or self._drops) and not self.transport.is_closing():
            self.transport.close()

    # --- what it reads ---

    def pause_writing(self) -> None:
        """The client reads more slowly than it is answered."""
        super().pause_writing()
        if self._watch is None:
            self._look()

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        self._unwatch()

    def on_response_complete(self) -> None:
        """All of an answer was written, though not all of it may be sent."""
        super().on_response_complete()
        if self._watch is None and self.transport.get_write_buffer_size():
            self._look()

    def _look(self) -> None:
        """Look again later; closes at once when the client took nothing since the last look."""
        unread = self.transport.get_write_buffer_size()
        if self._watch is not None and unread and unread >= self._unread:
            self.transport.abort()  # closing would wait until all is sent
        elif unread:
            self._unread, self._watch = unread, self.loop.call_later(self.patience, self._look)
        else:
            self._watch = None

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
