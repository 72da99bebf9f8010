"""A file of texts, one a line, as records: read as they are asked for, in windows of bounded size.

Decides what a line means, how many are held at once, and how a reading is continued later. Knows nothing of what is asked of
the records.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from lorax_core.cli.streams import MARK, MAX_TEXT, check_stdin, decoded
from lorax_core.errors import RequestError, listed, nearest, shown
from lorax_core.untrusted import unusable

_CHUNK: Final = 2**20
_NOTHING: Final = hashlib.sha256().hexdigest()


@dataclass(frozen=True, slots=True)
class TextRecord:
    """A text; `id` is what its line calls it, None where it does not. `line` counts from 1."""

    line: int
    text: str
    id: Any = None


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a file between two lines: how many `records` and `bytes` are before it, and the SHA-256 of these bytes."""

    records: int = 0
    bytes: int = 0
    digest: str = _NOTHING


BEGINNING: Final = Position()


@dataclass(frozen=True, slots=True)
class Window:
    """Records that are answered together, and the position behind them.

    `error` says what is wrong with the line behind them; the window is then shorter than it should be, and has no `end`.
    """

    records: list[TextRecord]
    end: Position | None
    error: RequestError | None = None


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much a window holds: so many records, and no further one once these bytes are reached."""

    # Several steps of the engine, so that the last one, which is not full, costs little; and of a large model not an hour.
    records: int = 512
    bytes: int = 128 * 2**10


@dataclass(frozen=True, slots=True)
class RecordFile:
    """A file, or for - stdin. Lines of a `.jsonl` or `.ndjson`, or wherever a field is named, are JSON objects."""

    file: Path
    json_field: str | None = None
    bounds: Bounds = field(default_factory=Bounds)

    @property
    def is_json(self) -> bool:
        """Whether a line is a JSON object, and no text."""
        return self.json_field is not None or self.file.suffix in (".jsonl", ".ndjson")

    @property
    def title(self) -> str:
        """What messages call it."""
        return "stdin" if self.from_stdin else str(self.file)

    def name(self, index: int) -> str:
        """What messages call a record."""
        return f"line {index + 1} of {self.title}"

    @property
    def from_stdin(self) -> bool:
        """Whether it is stdin, which is read once."""
        return str(self.file) == "-"

    def is_file(self, other: Path) -> bool:
        """Whether this is another name of that file, or stdin redirected from it."""
        try:
            mine = os.fstat(sys.stdin.fileno()) if self.from_stdin else self.file.stat()
            return os.path.samestat(mine, other.stat())
        except (OSError, ValueError):  # one of them is not there, or cannot be
            return False

    def check(self) -> None:
        """Raises RequestError when there is nothing that can be read."""
        if self.from_stdin:
            check_stdin()
        # A pipe may be opened once.
        # os.path: of a name that cannot be, Path's own methods raise.
        elif not os.path.exists(self.file) or os.path.isdir(self.file) or self._is_regular():
            with self._opened():
                pass

    def count(self) -> int | None:
        """How many records it has; None where it can be read only once."""
        if self.from_stdin or not self._is_regular():
            return None
        lines, last = 0, b"\n"
        with self._opened() as stream:
            while chunk := stream.read(_CHUNK):
                lines, last = lines + chunk.count(b"\n"), chunk[-1:]
        return lines + (last != b"\n")

    def windows(self, start: Position = BEGINNING) -> Iterator[Window]:
        """The records behind a position. A line that is none is told by the window before it, which is the last.

        Raises RequestError where the file before the position is not what it was.
        """
        with self._opened() as stream:
            digest, at = self._skip(stream, start), start
            while True:
                records, data, error = self._window(stream, at.records + 1)
                if error is not None:
                    yield Window(records, None, error)
                if error is not None or not records:
                    return
                digest.update(data)
                at = Position(at.records + len(records), at.bytes + len(data), digest.hexdigest())
                yield Window(records, at)

    def _window(self, stream: IO[bytes], first: int) -> tuple[list[TextRecord], bytes, RequestError | None]:
        """The next records and the bytes that they were read from; and what is wrong with the line behind them."""
        records: list[TextRecord] = []
        lines: list[bytes] = []
        size = 0
        try:
            while len(records) < self.bounds.records and size < self.bounds.bytes:
                line = self._line(stream, first + len(records))
                if not line:
                    break
                records.append(self._record(line, first + len(records)))
                lines.append(line)
                size += len(line)
        except RequestError as error:
            return records, b"".join(lines), error
        return records, b"".join(lines), None

    def _is_regular(self) -> bool:
        return stat.S_ISREG(self.file.stat().st_mode)

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        if self.from_stdin:
            yield sys.stdin.buffer
            return
        try:
            stream = self.file.open("rb")
        except (OSError, ValueError) as error:
            raise RequestError(
                f"{self.title} cannot be read: {getattr(error, 'strerror', None) or error}",
                hint="give a file of texts, one a line, or - for stdin",
            ) from error
        with stream:
            yield stream

    def _skip(self, stream: IO[bytes], start: Position) -> Any:
        """Reads what is before a position; gives the hash of it, to go on with."""
        digest, left = hashlib.sha256(), start.bytes
        while left and (chunk := stream.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
        if left or digest.hexdigest() != start.digest:
            raise RequestError(
                f"{self.title} has changed within the {start.records:,} lines that are answered already",
                hint="give the file as it was, or start over: --restart",
            )
        return digest

    def _line(self, stream: IO[bytes], number: int) -> bytes:
        """The next line with its line feed; nothing at the end."""
        try:
            data = stream.readline(MAX_TEXT + 2)
        except OSError as error:
            raise RequestError(
                f"{self.title} cannot be read: {error.strerror}", hint="what was answered until here is kept: try again"
            ) from error
        if len(data.rstrip(b"\n")) > MAX_TEXT:
            raise RequestError(
                f"{self.name(number - 1)} has more than {MAX_TEXT:,} bytes",
                hint="give shorter texts, each on a line of its own",
            )
        return data

    def _record(self, data: bytes, number: int) -> TextRecord:
        data = data.removesuffix(b"\n").removesuffix(b"\r")
        text = decoded(data.removeprefix(MARK) if number == 1 else data, number, self.title)
        return self._json_record(text, number) if self.is_json else TextRecord(number, text)

    def _json_record(self, line: str, number: int) -> TextRecord:
        where, field = self.name(number - 1), self.json_field or "text"
        try:
            found = json.loads(line, parse_constant=_finite, parse_float=_finite)
        except _InfiniteError as error:
            raise RequestError(f"{where} holds the number {error}", hint="give null, or a finite number") from error
        # ValueError: no JSON, or a number of more digits than Python converts; RecursionError: json's parser recurses.
        except (ValueError, RecursionError) as error:
            cause = "nested too deeply" if isinstance(error, RecursionError) else error
            empty = "an empty line is none either: grep . leaves them out"
            hint = f'{{"{field}": "..."}} is one; ' + (empty if not line.strip() else "one object stands on one line")
            raise RequestError(f"{where} is not JSON: {cause}", hint=hint) from error
        problem = unusable(found)
        if problem is not None:
            raise RequestError(f"{where} {problem}", hint="give text that can be encoded as UTF-8")
        if not isinstance(found, dict):
            raise RequestError(f"{where} is not a JSON object: {shown(found, 60)}", hint=f'{{"{field}": "..."}} is one')
        if field not in found:
            close = nearest(field, found)
            texts = [key for key, value in found.items() if isinstance(value, str)]
            # Of several, such as an id and a body, none is likelier.
            if close is None and len(texts) == 1:
                close = texts[0]
            raise RequestError(
                f"{where} has no field {field!r}; it has {listed(key[:60] for key in found)}",
                hint=f"--field {close}" if close is not None else "--field NAME says which one holds the text",
            )
        text = found[field]
        if not isinstance(text, str):
            raise RequestError(
                f"{where}: the field {field!r} is not text: {shown(text, 60)}", hint="--field NAME names another one"
            )
        return TextRecord(number, text, found.get("id"))


class _InfiniteError(ValueError):
    """A number that cannot be written as JSON again."""


def _finite(number: str) -> float:
    found = float(number)
    if not math.isfinite(found):
        raise _InfiniteError(number[:60])
    return found
