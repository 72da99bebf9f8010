"""A server on loopback with a route of its own over the gateway, in a thread of this process or in a process of its own.

`python loopback.py CHECKPOINT OPTIONS` is such a process: OPTIONS is JSON, and its address is the first line of stdout.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
from fastapi import APIRouter, Request, Response

import lorax_core
from lorax_core.server.app import build_app
from lorax_core.server.errors import failure
from lorax_core.server.gateway import Events, Gateway
from lorax_core.server.middleware import EveryRequest
from lorax_core.server.options import ServerOptions
from lorax_core.server.run import address, listen, running, serve_app
from lorax_core.server.schemas import Body
from lorax_core.server.sse import EventStream, data

LIMIT = 30.0
"""Seconds after which what a test waits for will not come."""
# One for all: a client takes longer to make than most answers to come. It keeps no connection, whose end tests wait for.
_CLIENT = httpx.Client(verify=False, trust_env=False, timeout=LIMIT, limits=httpx.Limits(max_keepalive_connections=0))
_KINDS = {
    "generate": lorax_core.GenerateRequest,
    "embed": lorax_core.EmbedRequest,
    "classify": lorax_core.ClassifyRequest,
}


class Ask(Body):
    """`count` equal requests, with the options of the Python interface."""

    task: Literal["generate", "embed", "classify"] = "generate"
    options: dict[str, Any]
    count: int = 1
    stream: bool = False


def asking(gateway: Gateway) -> APIRouter:
    """`POST /ask`, and routes that behave badly."""
    routes = APIRouter()

    @routes.post("/ask")
    async def ask(http: Request, body: Ask) -> Any:
        requests: list[Any] = [_KINDS[body.task](**body.options)] * body.count
        if body.stream:
            events = await gateway.events(http, requests)
            return EventStream(events, _lines(events), lambda error: data({"error": failure(error).kind}))
        results = await gateway.answer(http, requests)
        return {"tokens": [result.usage.total_tokens for result in results]}

    @routes.get("/big/{size}")
    async def big(size: int) -> Response:
        return Response(bytes(size))

    @routes.get("/forever")
    async def forever() -> None:
        await asyncio.Event().wait()

    return routes


async def _lines(events: Events) -> AsyncGenerator[bytes, None]:
    async for event in events:
        yield data({"text": event.text, "end": event.completion is not None})


class Loopback:
    """A server in a thread; `close` ends it. Clients may connect at once."""

    def __init__(self, engine: Any, **options: Any) -> None:
        chosen = ServerOptions(**{"port": 0, "drain_timeout": 0, **options})
        bound = listen(chosen)
        self.url, self.port = address(bound), bound.getsockname()[1]
        self.app = build_app(engine, chosen, model_name="base")
        self.gateway: Gateway = self.app.state.gateway
        self.app.include_router(asking(self.gateway))
        self._runs = ExitStack()
        self.server = self._runs.enter_context(running(self.app, chosen, bound))

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, and whatever it does."""
        self._runs.close()

    def ask(self, options: dict[str, Any], *, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
        """The answer to `POST /ask`."""
        body = {"options": options, **more}
        return _CLIENT.post(f"{self.url}/ask", json=body, headers=headers)

    def connect(self, sent: bytes = b"") -> socket.socket:
        """A connection on which these bytes were sent."""
        made = socket.create_connection(("127.0.0.1", self.port), LIMIT)
        made.sendall(sent)
        return made

    def bodies(self) -> int:
        """Bytes of the bodies of all requests that are not answered."""
        layer: Any = self.app.middleware_stack
        while layer is not None and not isinstance(layer, EveryRequest):
            layer = layer.app
        return 0 if layer is None else layer._held.bytes

    def metric(self, name: str) -> float:
        """The value of a metric, all of its labels together."""
        lines = self.gateway.metrics.render().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0].partition(" ")[0] == name)


@contextmanager
def listening(engine: Any, **options: Any) -> Iterator[str]:
    """The address of a server of this engine, which ends with the block."""
    with Loopback(engine, **{"drain_timeout": 1, **options}) as server:
        yield server.url


def http(path: str, body: Any = None, *headers: str) -> bytes:
    """A request as bytes: POST with a JSON body, or GET."""
    sent = b"" if body is None else json.dumps(body).encode()
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "Host: server", *headers]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(sent)}"]
    return "\r\n".join([*lines, "", ""]).encode() + sent


def until(condition: Callable[[], Any]) -> None:
    """Wait for what another thread or process does."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.002)


@contextmanager
def held(engine: Any) -> Iterator[None]:
    """No step begins meanwhile."""
    inside, released = threading.Event(), threading.Event()

    def job(loop: Any) -> None:
        inside.set()
        released.wait(LIMIT)

    thread = threading.Thread(target=engine._worker.call, args=[job])
    thread.start()
    assert inside.wait(LIMIT)
    try:
        yield
    finally:
        released.set()
        thread.join(LIMIT)


def left(engine: Any) -> tuple[int, int]:
    """Sequences that live, and pages that they hold."""
    found: list[tuple[int, int]] = []

    def look(loop: Any) -> None:
        allocator = loop.scheduler.allocator
        found.append((len(loop.scheduler), allocator.capacity - allocator.available))

    engine._worker.call(look)
    return found[0]


class Child:
    """A server in a process of its own."""

    def __init__(self, checkpoint: Path, *, adapters: dict[str, str] | None = None, **options: Any) -> None:
        given = json.dumps({"adapters": adapters or {}, "options": options})
        command = [sys.executable, __file__, str(checkpoint), given]
        pipe = subprocess.PIPE
        # One thread: several that spin on a machine that others use too take many times as long.
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            raise RuntimeError(self.process.communicate()[1])
        self.port = int(self.url.rpartition(":")[2])
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.ended()

    def ended(self) -> int:
        """Its exit status, once it has ended."""
        status = self.process.wait(LIMIT)
        self._reader.join(LIMIT)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        return status

    def connect(self, sent: bytes = b"") -> socket.socket:
        """A connection on which these bytes were sent."""
        made = socket.create_connection(("127.0.0.1", self.port), LIMIT)
        made.sendall(sent)
        return made

    def resident(self) -> int:
        """Bytes of memory that it has now."""
        return 4_096 * int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])


def _serve(checkpoint: str, given: dict[str, Any]) -> None:
    from lorax_core.server.logs import set_up_logs

    options = ServerOptions(port=0, **given["options"])
    bound = listen(options)
    set_up_logs(options.log_format)
    # Few rows: torch and oneDNN keep something for every shape that they have seen.
    sizes = {"kv_cache_tokens": 4_096, "max_batch_rows": 8}
    with lorax_core.load(checkpoint, adapters=given["adapters"], **sizes) as engine:
        app = build_app(engine, options, model_name="base")
        app.include_router(asking(app.state.gateway))
        print(address(bound), flush=True)
        serve_app(app, options, bound)


if __name__ == "__main__":
    _serve(sys.argv[1], json.loads(sys.argv[2]))
