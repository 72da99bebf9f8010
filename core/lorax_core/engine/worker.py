"""A thread that runs the step loop for many callers.

Decides when to step and hands work in and out. The loop itself is touched by this thread alone. The thread ends when the
worker is closed, or when nothing refers to the worker any more.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from lorax_core.engine.loop import EngineLoop
from lorax_core.engine.process import OwnProcess
from lorax_core.engine.sequence import AdapterRef, Sequence, SequenceUpdate
from lorax_core.engine.stats import StepStats, Totals
from lorax_core.errors import LoraxError, RequestError
from lorax_core.kernels.workers import end_workers

_log = logging.getLogger(__name__)
_EXIT_SECONDS = 60.0
"""How long the end of the process waits for a step in progress."""

_living: weakref.WeakSet[_Stepper] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # A daemon thread that is killed inside a torch operator aborts the whole process.
    for stepper in list(_living):
        stepper.close(_EXIT_SECONDS)


def _forget_all() -> None:
    global _living
    _living = weakref.WeakSet()


# A forked child has none of the threads, and would wait for their locks when it ends.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


class EngineWorker:
    """Steps while there is work and sleeps while there is none. Safe to call from any thread of its process.

    Dropping it ends its thread after the step in progress. Who waits for an answer must hold it, or one of its methods.
    """

    def __init__(self, loop: EngineLoop) -> None:
        self._stepper = _Stepper(loop)
        # The thread holds the stepper and not this, which would then never be dropped. `atexit` has its own way, above.
        weakref.finalize(self, self._stepper.stop).atexit = False
        self._stepper.start()

    @property
    def last_step(self) -> StepStats | None:
        """The numbers of the last step, None before the first."""
        return self._stepper.loop.last_step

    @property
    def closed(self) -> bool:
        """Whether it takes no more work: it was closed, or the loop broke."""
        return self._stepper.closed

    @property
    def totals(self) -> Totals:
        """The numbers of all steps together."""
        return self._stepper.loop.totals

    @property
    def adapter_came(self) -> Callable[[AdapterRef, LoraxError | None], None]:
        """The listener for adapters that are on the device or failed. Holds the thread's work and not the worker."""
        return self._stepper.adapter_came

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Sequences join together, before the next step. Raises RequestError when the engine is closed."""
        self._stepper.submit(sequences)

    def abort(self, sequences: Iterable[Sequence]) -> None:
        """Sequences leave before the next step."""
        self._stepper.abort(sequences)

    def call(self, job: Callable[[EngineLoop], None]) -> None:
        """Do something with the loop between two steps, and wait for it; its exception is raised here."""
        self._stepper.call(job)

    def close(self, timeout: float | None = None) -> None:
        """Stop after the step in progress, which is awaited for `timeout` seconds; sequences still alive end with an error.

        Idempotent.
        """
        self._stepper.close(timeout)


class _Stepper:
    """The thread, and what is handed to it."""

    def __init__(self, loop: EngineLoop) -> None:
        self.loop = loop
        self._process = OwnProcess()
        self._changed = threading.Condition()
        self._joining: deque[Sequence] = deque()
        self._leaving: deque[Sequence] = deque()
        self._jobs: deque[tuple[Callable[[EngineLoop], None], Future[None]]] = deque()
        self._due: deque[tuple[Callable[[EngineLoop], None], Future[None]]] = deque()  # the thread's own
        self._came: deque[tuple[AdapterRef, LoraxError | None]] = deque()
        self._stalled = False  # every living sequence waits for its adapter
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="lorax-engine", daemon=True)

    def start(self) -> None:
        _living.add(self)
        self._thread.start()

    def submit(self, sequences: Iterable[Sequence]) -> None:
        self._process.check()
        with self._changed:
            self._check_open()
            self._joining.extend(sequences)
            self._changed.notify_all()

    def abort(self, sequences: Iterable[Sequence]) -> None:
        self._process.check()
        with self._changed:
            self._leaving.extend(sequences)
            self._changed.notify_all()

    def call(self, job: Callable[[EngineLoop], None]) -> None:
        self._process.check()
        done: Future[None] = Future()
        with self._changed:
            self._check_open()
            self._jobs.append((job, done))
            self._changed.notify_all()
        done.result()

    def adapter_came(self, adapter: AdapterRef, error: LoraxError | None) -> None:
        end_workers()  # of the thread that bound it, which waits for the next adapter now
        with self._changed:
            self._came.append((adapter, error))
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        return self._closed

    def stop(self) -> None:
        """Ask the thread to end, without waiting. Also a finaliser: any thread may run it, at any time."""
        if not self._process.here:
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self, timeout: float | None = None) -> None:
        self._process.check()
        self.stop()
        if threading.current_thread() is not self._thread:
            # A thread that joins itself raises RuntimeError.
            self._thread.join(timeout)

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("the engine is closed", hint="load it again")

    def _run(self) -> None:
        try:
            while self._take():
                self._work()
                if self.loop.busy:
                    self._stalled = not self.loop.step()
        except (
            BaseException
        ):  # also a panic of a Rust library: waiting callers must get an error, or they block forever
            _log.exception("the step loop broke, and the engine closes")
            with self._changed:
                self._closed = True
        with self._changed:
            self._collect_jobs()
        self._work()
        while self._joining:
            self.loop.add(self._joining.popleft())
        while self.loop.busy:  # again, for answers that waited for the one before them
            for sequence in list(self.loop.scheduler):
                self.loop.abort(sequence)
                closed = LoraxError("the engine was closed before this request finished", hint="load it again")
                sequence.sink(SequenceUpdate(error=closed))

    def _work(self) -> None:
        while self._due:
            job, done = self._due.popleft()
            try:
                job(self.loop)
                done.set_result(None)
            except BaseException as error:
                # Also SystemExit and the like: they belong to the caller, and must not end this thread.
                done.set_exception(error)
            # Not kept while the thread sleeps: a job may hold the engine.
            del job, done

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
            # With them: a job that was asked for after a sequence was to leave comes after that.
            self._collect_jobs()
            # Anything new may have made a sequence runnable, an adapter above all.
            self._stalled = False
        # Without the lock: what follows takes locks of the store and of calls, whose holders may come here to abort.
        # In this order: a sequence may leave before it ever ran.
        for sequence in joining:
            self.loop.add(sequence)
        for sequence in leaving:
            self.loop.abort(sequence)
        for adapter, error in came:
            if error is not None:
                self.loop.fail(adapter, error)
        return True

    def _collect_jobs(self) -> None:
        """Take the jobs that were asked for so far. The caller holds `_changed`."""
        self._due += self._jobs
        self._jobs.clear()

    @property
    def _runs(self) -> bool:
        return self.loop.busy and not self._stalled
