"""A file that is written piece by piece, appears whole, and is continued after an interruption.

Decides what lies beside it meanwhile: `NAME.part`, what is written so far, and `NAME.part.json`, of what and how far. Knows
nothing of what is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
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
_START_OVER: Final = "start over: --restart"
_NAME: Final = "give another name"
_NO_LINK: Final = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
# No "*.txt": texts that lie beside a model are no part of it.
_MARKED: Final = ("*.json", "*.safetensors", "*.jinja", "*.model", "vocab.txt", "merges.txt")


class FileHead(Protocol):
    """The first bytes of a file that say what follows: as many as `size`, known when all is written."""

    @property
    def size(self) -> int:
        """How many bytes it has."""

    @property
    def row(self) -> int | None:
        """How many bytes each record has behind it; None where they differ."""

    def data(self, records: int, written: int) -> bytes:
        """Of so many records, which took so many bytes behind the head."""


class NoHead:
    """A file of lines has none."""

    size = 0
    row = None

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
        self._kept = 0
        # Together, so that an interruption finds both as they were or as they are.
        self._done = BEGINNING, 0  # up to where records are in it, and the bytes that they took behind the head
        self._check_free()
        begun = self._is_begun()
        if begun and not restart:
            self._read_state()

    @property
    def position(self) -> Position:
        """Up to where records are in it: where to go on."""
        return self._done[0]

    @property
    def kept(self) -> int:
        """How many records the next process would find: a full disk may have kept less than was added."""
        return self._kept

    def add(self, data: bytes, end: Position) -> None:
        """Appends what was made of the records up to a position. Saved every second, and when `writing` ends."""
        assert self._stream is not None
        self._stream.write(data)
        self._done = end, self._done[1] + len(data)
        if time.monotonic() - self._saved >= SAVE_EVERY:
            self._save()

    @contextlib.contextmanager
    def writing(self, head: FileHead) -> Iterator[None]:
        """Within, pieces may be added; afterwards it is `out`. After an error what was added is kept, to be continued.

        Where nothing was added nothing is left.
        """
        try:
            with self._opened() as self._stream:
                self._begin(head)
                try:
                    yield
                except BaseException:
                    if self._done[0].records:
                        self._save()
                    else:
                        self._discard()
                    raise
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
                hint="give a file in a folder that you may write to, on a disk with room",
            ) from error
        finally:
            self._stream = None

    @contextlib.contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        with open(os.open(self._part, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666), "r+b") as stream:
            if not _locked(stream) or not os.path.samestat(os.fstat(stream.fileno()), self._part.stat()):
                raise RequestError(
                    f"another process writes {self.out}", hint="wait for it, or give another --out to this one"
                )
            yield stream

    def _check_free(self) -> None:
        # os.path: of a name that cannot be, Path's own methods raise.
        if not os.path.isdir(self.out.parent):
            raise RequestError(f"there is no folder {str(self.out.parent)!r}", hint=f"mkdir -p {self.out.parent}")
        if os.path.islink(self.out) and not os.path.exists(self.out):
            raise RequestError(f"{self.out} is a link to {os.readlink(self.out)}, which is not there", hint=_NAME)
        if os.path.exists(self.out) and not os.path.isfile(self.out):
            raise RequestError(f"{self.out} is not a regular file", hint=_NAME)
        if os.path.exists(self.out) and not self._overwrite:
            raise RequestError(f"{self.out} is there already", hint="give another name, or --overwrite")

    def _is_begun(self) -> bool:
        """Whether a part and its state are there. Raises RequestError for something else that has one of their names."""
        for file in (self._part, self._state):
            if os.path.lexists(file) and not stat.S_ISREG(file.lstat().st_mode):
                what = "is a link" if file.is_symlink() else "is not a regular file"
                raise RequestError(f"'{file}' {what}", hint="remove it, or give another --out")
        if not os.path.exists(self._part):
            return False
        if os.path.exists(self._state):
            return True
        # An empty one is of a process that was killed before it had written a state.
        if self._part.stat().st_size and not self.restart:
            raise RequestError(
                f"{self._part} is there already, and no {self._state.name} says of what",
                hint="move it away, or give another --out; --restart replaces it",
            )
        return False

    def _read_state(self) -> None:
        try:
            found = read_json(self._state, RequestError, _STATE_BYTES)
        except RequestError as error:
            raise RequestError(error.message, hint=_START_OVER) from error
        if not isinstance(found, dict) or found.get("schema") != SCHEMA or not isinstance(found.get("job"), dict):
            raise RequestError(f"'{self._state}' is not of this version", hint=_START_OVER)
        counts = [one for name in ("records", "bytes", "written") if type(one := found.get(name)) is int and one >= 0]
        # A line has a line feed, and an answer some bytes: none of them is zero alone.
        if len(counts) != 3 or len(set(map(bool, counts))) != 1 or not isinstance(found.get("sha256"), str):
            raise RequestError(f"'{self._state}' is damaged", hint=_START_OVER)
        if not counts[0]:
            return  # nothing is lost, whatever the job was
        job = found["job"]
        if other := [name for name in {**job, **self._job} if job.get(name) != self._job.get(name)]:
            raise RequestError(
                f"{self._part} was begun with another {', '.join(other)}",
                hint="the same command line as then continues it; --restart starts over",
            )
        self._done = Position(counts[0], counts[1], found["sha256"]), counts[2]

    def _begin(self, head: FileHead) -> None:
        """Room for the head, and behind it what was saved; what had been written after that is cut off."""
        assert self._stream is not None
        at, written = self._done
        size = head.size + written
        if written and os.fstat(self._stream.fileno()).st_size < size:
            raise RequestError(f"'{self._part}' is shorter than '{self._state}' says", hint=_START_OVER)
        if head.row is not None and written != at.records * head.row:
            raise RequestError(
                f"'{self._state}' is damaged: {written:,} bytes are not {at.records:,} rows", hint=_START_OVER
            )
        # First the state: a part that is not empty is never without one, nor shorter than it says.
        self._save()
        self._stream.truncate(size)
        self._stream.seek(size)

    def _save(self) -> None:
        """All that was added is on the disk, and then a state that says so."""
        self._flush()
        at, written = self._done
        state = {"schema": SCHEMA, "job": self._job, "records": at.records, "bytes": at.bytes, "sha256": at.digest}
        fresh = self._state.with_name(self._state.name + ".new")
        write_new(fresh, json.dumps({**state, "written": written}, indent=2) + "\n")
        fresh.replace(self._state)
        self._kept, self._saved = at.records, time.monotonic()

    def _discard(self) -> None:
        """Neither file is left. A state alone says nothing, so it goes last."""
        self._part.unlink(missing_ok=True)
        self._state.unlink(missing_ok=True)

    def _flush(self) -> None:
        assert self._stream is not None
        self._stream.flush()
        os.fsync(self._stream.fileno())


def beside(out: Path) -> tuple[Path, ...]:
    """The files that a `PartFile` of this name writes."""
    return tuple(out.with_name(out.name + ending) for ending in (".part", _STATE, f"{_STATE}.new"))


def write_new(file: Path, text: str) -> None:
    """Writes a file that nobody else has: what was there is left to its other names, and a link is not followed."""
    file.unlink(missing_ok=True)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o666), "wb") as stream:
        stream.write(text.encode())


def files_mark(folder: Path) -> str:
    """What tells a checkpoint or adapter from another one: a hash of its files' names, sizes and times of change."""
    # One level down are the modules of sentence-transformers. A state may lie there too, and changes as it should.
    found = sorted(
        file
        for name in _MARKED
        for file in (*folder.glob(name), *folder.glob(f"*/{name}"))
        if not file.name.endswith(_STATE)
    )
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
