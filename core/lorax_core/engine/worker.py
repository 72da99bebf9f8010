"""A thread that runs the step loop for many callers.

Decides when to step and hands work in and out. The loop itself is touched by this thread alone.
"""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from lorax_core.engine.loop import EngineLoop
from lorax_core.engine.sequence import AdapterRef, Sequence, SequenceUpdate
from lorax_core.engine.stats import StepStats
from lorax_core.errors import LOAD_AGAIN, LoraxError, RequestError

_log = logging.getLogger(__name__)
_EXIT_SECONDS = 60.0
"""How long the end of the process waits for a step in progress."""

_living: weakref.WeakSet[EngineWorker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # A daemon thread that is killed inside a torch operator aborts the whole process.
    for worker in list(_living):
        worker.close(_EXIT_SECONDS)


class EngineWorker:
    """Steps while there is work and sleeps while there is none. Safe to call from any thread."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop
        self._changed = threading.Condition()
        self._joining: deque[Sequence] = deque()
        self._leaving: deque[Sequence] = deque()
        self._jobs: deque[tuple[Callable[[EngineLoop], None], Future[None]]] = deque()
        self._came: deque[tuple[AdapterRef, LoraxError | None]] = deque()
        self._stalled = False  # every living sequence waits for its adapter
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="lorax-engine", daemon=True)
        _living.add(self)
        self._thread.start()

    @property
    def steps(self) -> int:
        """Steps so far."""
        return self._loop.steps

    @property
    def last_step(self) -> StepStats | None:
        """The numbers of the last step, None before the first."""
        return self._loop.last_step

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Sequences join together, before the next step. Raises RequestError when the engine is closed."""
        with self._changed:
            if self._closed:
                raise RequestError("the engine is closed", hint="load it again")
            self._joining.extend(sequences)
            self._changed.notify_all()

    def abort(self, sequences: Iterable[Sequence]) -> None:
        """Sequences leave before the next step."""
        with self._changed:
            self._leaving.extend(sequences)
            self._changed.notify_all()

    def call(self, job: Callable[[EngineLoop], None]) -> None:
        """Do something with the loop between two steps, and wait for it; its exception is raised here."""
        done: Future[None] = Future()
        with self._changed:
            if self._closed:
                raise RequestError("the engine is closed", hint="load it again")
            self._jobs.append((job, done))
            self._changed.notify_all()
        done.result()

    def adapter_came(self, adapter: AdapterRef, error: LoraxError | None) -> None:
        """An adapter that sequences wait for is on the device, or cannot be had. No-op when the engine is closed."""
        with self._changed:
            self._came.append((adapter, error))
            self._changed.notify_all()

    def close(self, timeout: float | None = None) -> None:
        """Stop after the step in progress, which is awaited for `timeout` seconds; sequences still alive end with an error.

        Idempotent.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            # A thread that joins itself raises RuntimeError.
            self._thread.join(timeout)
        _living.discard(self)

    def _run(self) -> None:
        try:
            while self._take():
                self._work()
                if self._loop.busy:
                    self._stalled = not self._loop.step()
        except (
            BaseException
        ):  # also a panic of a Rust library: waiting callers must get an error, or they block forever
            _log.exception("the step loop broke, and the engine closes")
            with self._changed:
                self._closed = True
        self._work()
        while self._joining:
            self._loop.add(self._joining.popleft())
        while self._loop.busy:  # again, for answers that waited for the one before them
            for sequence in list(self._loop.scheduler):
                self._loop.abort(sequence)
                sequence.sink(
                    SequenceUpdate(
                        error=LoraxError("the engine was closed before this request finished", hint=LOAD_AGAIN)
                    )
                )

    def _work(self) -> None:
        while self._jobs:
            job, done = self._jobs.popleft()
            try:
                job(self._loop)
                done.set_result(None)
            except BaseException as error:
                # Also SystemExit and the like: they belong to the caller, and must not end this thread.
                done.set_exception(error)

    def _take(self) -> bool:
        """Let sequences in and out; waits while there is nothing to do. False when the engine is closed."""
        with self._changed:
            while not (self._closed or self._joining or self._leaving or self._jobs or self._came or self._runs):
                self._changed.wait()
            if self._closed:
                return False
            joining, self._joining = self._joining, deque()
            leaving, self._leaving = self._leaving, deque()
            came, self._came = self._came, deque()
            # Anything new may have made a sequence runnable, an adapter above all.
            self._stalled = False
        # Without the lock: what follows takes locks of the store and of calls, whose holders may come here to abort.
        # In this order: a sequence may leave before it ever ran.
        for sequence in joining:
            self._loop.add(sequence)
        for sequence in leaving:
            self._loop.abort(sequence)
        for adapter, error in came:
            if error is not None:
                self._loop.fail(adapter, error)
        return True

    @property
    def _runs(self) -> bool:
        return self._loop.busy and not self._stalled
