"""Work that many callers may ask for at once, and that is done once.

Decides how the same name is fetched once for all who wait for it, and when waiting ends. Knows nothing of adapters.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError, wait
from typing import Protocol, TypeVar

_AT_ONCE = 4
WAITING = 64
"""Names that are fetched, or wait for their turn, at once; each has a thread."""

T = TypeVar("T")


class FetchLimits(Protocol):
    """How long a name is awaited, in seconds, and the errors of one that is late or comes when too many wait."""

    seconds: float

    def late(self, name: str, /) -> Exception: ...

    def full(self, name: str, /) -> Exception: ...


class Fetcher:
    """Calls `work(name)` in threads of its own.

    A download that hangs cannot be stopped; its thread is left behind, and the name can be fetched again.
    """

    def __init__(self, work: Callable[[str], object], limits: FetchLimits) -> None:
        self._work = work
        self._limits = limits
        self._running: dict[str, Future[None]] = {}
        self._lock = threading.Lock()
        self._turns = threading.BoundedSemaphore(_AT_ONCE)

    def fetch(self, names: Iterable[str]) -> Future[None]:
        """Done when all of the names are; fails with the first error among them. Does not block."""
        futures = [self._one(name) for name in dict.fromkeys(names)]
        together: Future[None] = Future()
        left = len(futures)
        # Not self._lock: `done` may run at once, in the thread that adds it, and in many others.
        lock = threading.Lock()

        def done(one: Future[None]) -> None:
            nonlocal left
            with lock:
                left -= 1
                if not together.done() and (one.exception() is not None or not left):
                    _settle(together, one.exception())

        if not futures:
            together.set_result(None)
        for future in futures:
            future.add_done_callback(done)
        return together

    def close(self, error: Exception) -> None:
        """Fail with `error` what is still awaited; later requests are not affected."""
        with self._lock:
            running = list(self._running.items())
        for name, future in running:
            self._end(name, future, error)

    def _one(self, name: str) -> Future[None]:
        with self._lock:
            running = self._running.get(name)
            if running is not None:
                return running
            future: Future[None] = Future()
            if len(self._running) >= WAITING:
                future.set_exception(self._limits.full(name))
                return future
            self._running[name] = future
        timer = threading.Timer(self._limits.seconds, self._end, (name, future, self._limits.late(name)))
        # Daemons, both: a hung download must not keep the process from ending.
        timer.daemon = True
        timer.start()
        future.add_done_callback(lambda _: timer.cancel())
        threading.Thread(target=self._run, args=(name, future), name="lorax-fetch", daemon=True).start()
        return future

    def _run(self, name: str, future: Future[None]) -> None:
        error: BaseException | None = None
        self._turns.acquire()
        turn = [self._turns]

        def give_back() -> None:
            with contextlib.suppress(IndexError):  # given back already
                turn.pop().release()

        # Work that hangs gives its turn back when its time is over.
        future.add_done_callback(lambda _: give_back())
        try:
            # The time may be over while it waited for its turn; then none awaits the result.
            if not future.done():
                self._work(name)
        except BaseException as failure:
            error = failure
        give_back()  # before those who wait go on, in this thread: they may fetch again
        self._end(name, future, error)

    def _end(self, name: str, future: Future[None], error: BaseException | None) -> None:
        with self._lock:
            # The name may be fetched again already, after this one was given up; that entry is not ours.
            if self._running.get(name) is future:
                del self._running[name]
        # Outside the lock: callbacks run in this thread, and may ask for another fetch.
        _settle(future, error)


def within(seconds: float, work: Callable[[], T], late: Callable[[], Exception]) -> T:
    """What `work` gives, computed in a thread of its own that is left behind when it takes longer; raises `late` then."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="lorax-fetch", daemon=True).start()
    if not wait([future], seconds).done:
        raise late()
    return future.result()


def _settle(future: Future[None], error: BaseException | None) -> None:
    try:
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
    except InvalidStateError:  # the time limit or close() ended it first, and its waiters have that error
        pass
