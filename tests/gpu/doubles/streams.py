"""The face of `torch.cuda` where steps are captured: streams, which know what is done before, and the rules of a capture.

Work is a word. It is launched on the current stream, or kept by the graph that is being captured.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stream:
    """What was launched on it or waited for: all of that is done before what comes next."""

    def __init__(self, device: Any = None) -> None:
        self.device = device
        self.before: list[str] = []

    def wait_stream(self, other: Stream) -> None:
        self.before += other.before


class CUDAGraph:
    """What was launched while it was captured, in which pool, and what was done before."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.pool: Any = None
        self.work: list[str] = []
        self.before: list[str] = []

    def replay(self) -> None:
        for work in self.work:
            self.cuda.launch(work)


class Cuda:
    """One GPU. `graphs` are those that were made."""

    Stream = Stream

    def __init__(self) -> None:
        self.graphs: list[CUDAGraph] = []
        self.current = Stream()
        self._capturing: CUDAGraph | None = None
        self._refuses: Any = None  # which threads: "every", or the one with this number

    def CUDAGraph(self) -> CUDAGraph:
        self.graphs.append(CUDAGraph(self))
        return self.graphs[-1]

    def graph_pool_handle(self) -> object:
        return object()

    def current_stream(self, device: Any) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(
        self, graph: CUDAGraph, *, pool: Any = None, stream: Stream, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        graph.pool = object() if pool is None else pool
        graph.before = stream.before[:]
        self._capturing = graph
        self._refuses = {"global": "every", "thread_local": threading.get_ident(), "relaxed": None}[capture_error_mode]
        try:
            with self.stream(stream):
                yield
        finally:
            self._capturing = self._refuses = None

    def launch(self, work: str) -> None:
        """Work of the device."""
        (self.current.before if self._capturing is None else self._capturing.work).append(work)

    def allocate(self) -> None:
        """What a capture may not meet: memory for an adapter, say."""
        if self._refuses in ("every", threading.get_ident()):
            raise RuntimeError("operation not permitted when stream is capturing")
