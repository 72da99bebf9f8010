"""Workers side by side: each gets cases until it dies or hangs, and is then replaced."""

from __future__ import annotations

import json
import os
import queue
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fuzz.verdicts import Finding, Kind, Verdict

DEADLINE = 30.0
"""Seconds for a case, its reference included; cases take some hundredths. Half of it is the reference's at most."""
START = 180.0
MAKING = 120.0
"""Seconds until a case is made: a worker's first ones load the engines of its house, on a machine that may be busy."""
UNMADE = "the case could not be made"
"""A mistake of the campaign's own, with which nothing can be said of us."""
WAITS = ("serving/call.py", "engine/worker.py", "serving/engine.py", "serving/stream.py")
"""Where callers and idle threads wait for others."""
TESTS = Path(__file__).resolve().parents[1]
Order = tuple[str, int, int]


class Worker:
    """A process that runs cases. Not safe for use by several threads."""

    def __init__(self, root: Path, deadline: float = DEADLINE) -> None:
        self._deadline = deadline
        self._place = tempfile.TemporaryDirectory(prefix="fuzz-")
        scratch = Path(self._place.name) / "scratch"
        scratch.mkdir()
        self._stack = Path(self._place.name) / "scratch.stack"
        self._errors = Path(self._place.name) / "errors"
        home = Path(self._place.name) / "home"
        home.mkdir()
        # Offline, and with a home of its own: hostile names must reach neither the network nor anybody's cache.
        said = {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HOME": str(home),
            "TOKENIZERS_PARALLELISM": "false",
        }
        path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fuzz.worker", str(root), str(scratch), str(deadline)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **said, "PYTHONPATH": path},
                cwd=self._place.name,
                start_new_session=True,
            )
        self._buffer = b""
        self._select = selectors.DefaultSelector()
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._select.register(self._process.stdout, selectors.EVENT_READ)
        if self._line(START) is None:
            raise RuntimeError(f"a worker did not start: exit code {self._process.poll()}")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def run(self, order: Order, plant: str = "") -> Verdict:
        """The verdict of a case, with a defect planted for it alone; the worker may be dead afterwards."""
        start, phase, changes = time.monotonic(), "make", []
        assert self._process.stdin is not None
        self._process.stdin.write((json.dumps([*order, plant]) + "\n").encode())
        self._process.stdin.flush()
        while True:
            said = self._line(start + (MAKING if phase == "make" else self._deadline) - time.monotonic())
            if said is None:
                return self._lost(order, phase, changes, time.monotonic() - start)
            if "verdict" in said:
                return Verdict.from_json(said["verdict"])
            if phase == "make":
                start = time.monotonic()
            phase, changes = said["phase"], said.get("changes", changes)

    def _lost(self, order: Order, phase: str, changes: list[str], seconds: float) -> Verdict:
        hung = self.alive
        where = ""
        if hung:
            self.stop()
            where = _where(self._stack)
        code = self._process.wait()
        kind, finding = (Kind.FINDING, Finding.HANG if hung else Finding.DIED)
        detail = f"no end within {seconds:.0f} s" if hung else f"exit code {code}"
        if phase == "reference":  # its hangs and crashes are not ours
            kind, finding, detail = Kind.WEAK, None, f"the reference: {detail}"
        if phase == "make":
            said = self._errors.read_text(errors="replace")[-1500:]
            finding, detail = Finding.DIED, f"{UNMADE}: {detail}: {said}"
        return Verdict(*order, kind, finding, "", where, detail, changes, seconds)

    def _line(self, seconds: float) -> dict[str, Any] | None:
        """The next message; None when time is up or the process ended."""
        end = time.monotonic() + seconds
        assert self._process.stdout is not None
        while b"\n" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0 or not self._select.select(left):
                return None
            read = self._process.stdout.read()
            if not read:
                self._process.wait()
                return None
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def stop(self) -> None:
        """Kill it; what it wrote stays until `close`."""
        if self.alive:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        """Kill it and remove its folders."""
        self.stop()
        self._select.close()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._place.cleanup()


def _where(stack: Path) -> str:
    """The innermost function of ours in a dump of all threads; the main thread comes last, and counts first."""
    threads = (stack.read_text(errors="replace") if stack.exists() else "").split("Thread 0x")
    for text in reversed(threads):
        found = re.findall(r'File ".*?/(?:core/lorax_core|src)/([a-z_0-9/]+\.py)", line \d+ in (\w+)', text)
        inner = [f"{file}:{name}" for file, name in found if file not in WAITS]
        if inner:
            return inner[0]
    return ""


def run_cases(
    root: Path,
    orders: Iterable[Order],
    done: Callable[[Verdict], bool | None],
    *,
    workers: int = 2,
    plant: str = "",
    deadline: float = DEADLINE,
) -> None:
    """Run cases on so many workers; `done` is called with each verdict, one at a time, and may return True to stop."""
    waiting: queue.SimpleQueue[Order] = queue.SimpleQueue()
    for order in orders:
        waiting.put(order)
    lock, stopped = threading.Lock(), threading.Event()
    failures: list[BaseException] = []

    def serve() -> None:
        worker = None
        try:
            while not stopped.is_set():
                try:
                    order = waiting.get_nowait()
                except queue.Empty:
                    return
                if worker is None or not worker.alive:
                    if worker is not None:
                        worker.close()
                    worker = Worker(root, deadline)
                verdict = worker.run(order, plant)
                if verdict.detail.startswith(UNMADE):
                    raise RuntimeError(f"{verdict.command}: {verdict.detail}")
                with lock:
                    if done(verdict):
                        stopped.set()
        except BaseException as error:  # a thread's own exception would be lost
            failures.append(error)
            stopped.set()
        finally:
            if worker is not None:
                worker.close()

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
