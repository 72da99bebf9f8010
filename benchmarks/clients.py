"""Clients of a server, many at once, in a process of their own.

    python clients.py    # a job as a line of JSON on stdin, what came of it on stdout

A job has the `address` of a server, so many `clients` for so many `seconds`, and its `requests`: `path`, `body` and whether
the answer is a `stream`. Each client sends one request after the other, the next of the list, and waits for the whole answer.
Imports nothing of the project: what is measured is the server, and clients that cost little leave it the machine.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any


class Clients:
    """All clients of a job, and what came of their requests."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.host, _, port = job["address"].rpartition("//")[2].rpartition(":")
        self.port = int(port)
        self.requests = [(one["path"], self._bytes(one), bool(one.get("stream"))) for one in job["requests"]]
        self.count, self.seconds = job["clients"], job["seconds"]
        self.numbers: Iterator[int] = itertools.count()
        self.answered: list[int] = []
        self.lost: Counter[str] = Counter()
        self.first: list[float] = []
        self.gaps: list[float] = []

    def _bytes(self, request: dict[str, Any]) -> bytes:
        body = json.dumps(request["body"]).encode()
        head = f"POST {request['path']} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def run(self) -> dict[str, Any]:
        """Answers until the time is over, and those that were asked for by then."""
        started = time.perf_counter()
        await asyncio.gather(*[self._client(started + self.seconds) for _ in range(self.count)])
        return {
            "seconds": time.perf_counter() - started,
            "answered": sorted(self.answered),
            "lost": dict(self.lost),
            "first": self.first,
            "gaps": self.gaps,
            "client_cpu": time.process_time(),
        }

    async def _client(self, end: float) -> None:
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while time.perf_counter() < end:
            number = next(self.numbers)
            path, sent, stream = self.requests[number % len(self.requests)]
            try:
                if connection is None:
                    connection = await asyncio.open_connection(self.host, self.port)
                connection[1].write(sent)
                wrong = await self._answer(connection[0], stream)
            except (OSError, EOFError, ValueError) as error:
                wrong, connection = f"{type(error).__name__}: {error}", None
            if wrong is None:
                self.answered.append(number)
            else:
                self.lost[f"{path}: {wrong}"[:300]] += 1
        if connection is not None:
            connection[1].close()

    async def _answer(self, reader: asyncio.StreamReader, stream: bool) -> str | None:
        """Read one answer; what is wrong with it, None where nothing is."""
        asked = time.perf_counter()
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        times: list[float] = []
        if b"transfer-encoding: chunked" in head:
            body = await self._pieces(reader, times)
        else:
            length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
            body = await reader.readexactly(int(length))
        if not head.startswith(b"http/1.1 200"):
            return f"{head[:12].decode()} {body[:200].decode(errors='replace')}"
        if not stream:
            return None
        if not body.endswith(b"data: [DONE]\n\n") or b'"error"' in body:
            return f"the stream ended with {body[-200:].decode(errors='replace')}"
        self.first.append(times[0] - asked)
        if len(times) > 1:
            self.gaps.append((times[-1] - times[0]) / (len(times) - 1))
        return None

    async def _pieces(self, reader: asyncio.StreamReader, times: list[float]) -> bytes:
        pieces = []
        while size := int(await reader.readline(), 16):
            pieces.append((await reader.readexactly(size + 2))[:-2])
            if b'"text"' in pieces[-1]:  # the last two pieces have none: usage, and that all is said
                times.append(time.perf_counter())
        await reader.readline()
        return b"".join(pieces)


def main() -> None:
    """One job."""
    job = json.loads(sys.stdin.readline())
    if job.get("cores"):
        os.sched_setaffinity(0, job["cores"])
    print(json.dumps(asyncio.run(Clients(job).run())))


if __name__ == "__main__":
    main()
