"""A file that is written piece by piece, appears whole, and is continued after an interruption.

Decides what lies beside it meanwhile: `NAME.part`, what is written so far, and `NAME.part.json`, of what and how far. Knows
nothing of what is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final, Protocol

from lorax_core.cli.records import BEGINNING, Position
from lorax_core.errors import RequestError
from lorax_core.untrusted import read_json

SCHEMA: Final = 1
"""Version of the shape of `NAME.part.json`."""
SAVE_EVERY: Final = 1.0
"""Seconds of work that a killed process may lose, and a little more."""
_STATE: Final = ".part.json"
_STATE_BYTES: Final = 2**20
_MARKED: Final = ("*.json", "*.safetensors", "*.jinja", "*/*.json", "*/*.safetensors")


class FileHead(Protocol):
    """The first bytes of a file that say what follows: as many as `size`, known when all is written."""

    @property
    def size(self) -> int:
        """How many bytes it has."""

    def data(self, records: int, written: int) -> bytes:
        """Of so many records, which took so many bytes behind the head."""


class NoHead:
    """A file of lines has none."""

    size = 0

    def data(self, records: int, written: int) -> bytes:
        """Nothing."""
        return b""


class PartFile:
    """`out` while it is written. `job` is what has to be the same when it is continued, as JSON."""

    def __init__(self, out: Path, job: Mapping[str, Any], *, overwrite: bool = False, restart: bool = False) -> None:
        """Raises RequestError when `out` may not be written, or was begun with another job."""
        self.out, self.restart = out, restart
        self._job = json.loads(json.dumps(job, default=str))
        self._overwrite = overwrite
        self._part = out.with_name(out.name + ".part")
        self._state = out.with_name(out.name + _STATE)
        self._stream: IO[bytes] | None = None
        self._saved = 0.0
        # Together, so that an interruption finds both as they were or as they are.
        self._done = BEGINNING, 0  # up to where records are in it, and the bytes that they took behind the head
        self._check_free()
        if not restart and os.path.exists(self._part) and os.path.exists(self._state):
            self._read_state()

    @property
    def position(self) -> Position:
        """Up to where records are in it: where to go on."""
        return self._done[0]

    def add(self, data: bytes, end: Position) -> None:
        """Appends what was made of the records up to a position. Saved every second, and when `writing` ends."""
        assert self._stream is not None
        self._stream.write(data)
        self._done = end, self._done[1] + len(data)
        if time.monotonic() - self._saved >= SAVE_EVERY:
            self._save()

    @contextlib.contextmanager
    def writing(self, head: FileHead) -> Iterator[None]:
        """Within, pieces may be added; afterwards it is `out`. After an error what was added is kept, to be continued."""
        try:
            with self._opened() as self._stream:
                self._begin(head.size)
                try:
                    yield
                finally:
                    self._save()
                self._check_free()  # writing may have taken long
                self._stream.seek(0)
                self._stream.write(head.data(self._done[0].records, self._done[1]))
                self._flush()
                self._part.rename(self.out)
                self._state.unlink()
        except OSError as error:
            raise RequestError(
                f"{self.out} cannot be written: {error.strerror or error}",
                hint="give a file in a folder that you may write to, on a disk with room; the same command line continues",
            ) from error
        finally:
            self._stream = None

    @contextlib.contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        with open(os.open(self._part, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b") as stream:
            if not _locked(stream) or not os.path.samestat(os.fstat(stream.fileno()), self._part.stat()):
                raise RequestError(
                    f"another process writes {self.out}", hint="wait for it, or give another --out to this one"
                )
            yield stream

    def _check_free(self) -> None:
        # os.path: of a name that cannot be, Path's own methods raise.
        if not os.path.isdir(self.out.parent):
            raise RequestError(f"there is no folder {str(self.out.parent)!r}", hint=f"mkdir -p {self.out.parent}")
        if os.path.exists(self.out) and not os.path.isfile(self.out):
            raise RequestError(f"{self.out} is no regular file", hint="give another name")
        if os.path.exists(self.out) and not self._overwrite:
            raise RequestError(f"{self.out} is there already", hint="give another name, or --overwrite")

    def _read_state(self) -> None:
        found = read_json(self._state, RequestError, _STATE_BYTES)
        anew = "the same command line as then continues it; --restart begins anew"
        if not isinstance(found, dict) or found.get("schema") != SCHEMA or not isinstance(found.get("job"), dict):
            raise RequestError(f"'{self._state}' is none of this version's", hint="begin anew: --restart")
        job = found["job"]
        if other := [name for name in {**job, **self._job} if job.get(name) != self._job.get(name)]:
            raise RequestError(f"{self._part} was begun with another {', '.join(other)}", hint=anew)
        counts = [one for name in ("records", "bytes", "written") if type(one := found.get(name)) is int and one >= 0]
        if len(counts) != 3 or not isinstance(found.get("sha256"), str):
            raise RequestError(f"'{self._state}' is damaged", hint="begin anew: --restart")
        self._done = Position(counts[0], counts[1], found["sha256"]), counts[2]

    def _begin(self, head: int) -> None:
        """Room for the head, and behind it what was saved; what had been written after that is cut off."""
        assert self._stream is not None
        size = head + self._done[1]
        if self._done[1] and os.fstat(self._stream.fileno()).st_size < size:
            raise RequestError(f"'{self._part}' is shorter than '{self._state}' says", hint="begin anew: --restart")
        self._stream.truncate(size)
        self._stream.seek(size)
        self._save()

    def _save(self) -> None:
        """All that was added is on the disk, and then a state that says so."""
        self._flush()
        at, written = self._done
        state = {"schema": SCHEMA, "job": self._job, "records": at.records, "bytes": at.bytes, "sha256": at.digest}
        fresh = self._state.with_name(self._state.name + ".new")
        fresh.write_text(json.dumps({**state, "written": written}, indent=2) + "\n", encoding="utf-8")
        fresh.replace(self._state)
        self._saved = time.monotonic()

    def _flush(self) -> None:
        assert self._stream is not None
        self._stream.flush()
        os.fsync(self._stream.fileno())


def files_mark(folder: Path) -> str:
    """What tells a checkpoint or adapter from another one: a hash of its files' names, sizes and times of change."""
    # One level down are the modules of sentence-transformers. A state may lie there too, and changes as it should.
    found = sorted(file for pattern in _MARKED for file in folder.glob(pattern) if not file.name.endswith(_STATE))
    facts = [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in found]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _locked(stream: IO[bytes]) -> bool:
    """Whether this process alone has the file now, until it closes it."""
    try:
        import fcntl
    except ImportError:  # Windows has none
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
