"""The three streams of a command.

Decides their encoding, UTF-8 whatever the locale says, and what it means when one of them fails: output that cannot be
written is an error, messages that cannot be written are not, and input is read as it comes. Knows nothing of commands.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, cast

from lorax_core.errors import LoraxError, RequestError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

MAX_TEXT: Final = 16 * 2**20
"""The longest line or prompt that is read from stdin, in bytes: far more than any model takes."""

MARK: Final = b"\xef\xbb\xbf"
"""A byte order mark in UTF-8, which some editors on Windows put first."""

_CHUNK: Final = 64 * 2**10  # what a pipe holds


class OutputError(LoraxError):
    """stdout cannot be written. `unwanted` says that its reader has left, as `head` does when it has enough."""

    def __init__(self, message: str, *, hint: str | None = None, unwanted: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.unwanted = unwanted


class _Output(io.FileIO):
    """stdout, whose failure is an `OutputError` and no OSError: nobody takes it for the failure of some other file."""

    _lost = False

    def write(self, data: ReadableBuffer, /) -> int:
        if self._lost:  # what Python still flushes at its end
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except KeyboardInterrupt:
            # It may have come just after the write, of which Python then does not know: nothing is written twice.
            self._lost = True
            raise
        except OSError as error:
            self._lost = True
            raise OutputError(
                f"stdout cannot be written: {error.strerror}",
                hint="the output is not complete: make room, or send it elsewhere",
                unwanted=isinstance(error, BrokenPipeError),
            ) from error


class _Messages(io.FileIO):
    """stderr, whose failure changes nothing: the exit code says the same."""

    def write(self, data: ReadableBuffer, /) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return memoryview(data).nbytes


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """stdout and stderr as this module has them, unless somebody else has replaced them.

    What is buffered is written at the end. Raises OutputError when stdout is closed, or cannot take what is written.
    """
    before = sys.stdout, sys.stderr
    # Of a closed stream Python makes None.
    closed = sys.__stdout__ is None and before[0] is None
    _keep_open()
    if before[1] is sys.__stderr__:
        sys.stderr = _text(_Messages(2, "w", closefd=False), "backslashreplace")
    if before[0] is sys.__stdout__ and not closed:
        sys.stdout = _text(_Output(1, "w", closefd=False), "surrogateescape")
    try:
        if closed:
            raise OutputError("stdout is closed", hint="> /dev/null is the way to do without the output")
        try:
            yield
        finally:
            # Also after an error or Ctrl-C: what was answered until then is written.
            sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before


def _text(raw: io.FileIO, errors: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors=errors, line_buffering=raw.isatty())


def _keep_open() -> None:
    """No file that is opened later gets the number of a closed stream; and none gives up because it would have to wait."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is what opening gives.
            os.open(os.devnull, os.O_RDWR)
        if os.name == "posix":
            os.set_blocking(number, True)


def read_prompt() -> str:
    """All of stdin without its last line break."""
    data = bytearray()
    while chunk := _read():
        data += chunk
        if len(data) > MAX_TEXT:
            raise _too_long("stdin")
    # One line break only, which echo adds; further ones are part of the prompt.
    return decoded(bytes(data.removeprefix(MARK)), 1).removesuffix("\n").removesuffix("\r")


def read_lines() -> Iterator[list[str]]:
    """The lines of stdin, as many at a time as a read gave, if any. They end at line feeds alone, after a CR or not."""
    rest: list[bytes] = []  # pieces of the line that has not ended: joined once, however long it is
    size, number = 0, 1
    while chunk := _read():
        *whole, last = chunk.split(b"\n")
        if whole:
            whole[0] = b"".join((*rest, whole[0]))
            rest, size = [], 0
        rest.append(last)
        size += len(last)
        if size > MAX_TEXT:
            raise _too_long(f"line {number + len(whole)} of stdin")
        if whole:
            yield from _texts(whole, number)
        else:
            yield []
        number += len(whole)
    yield from _texts([b"".join(rest)] if size else [], number)


def _texts(lines: list[bytes], number: int) -> Iterator[list[str]]:
    """Lines as text, all at once; what is wrong with one comes after the lines before it."""
    texts: list[str] = []
    try:
        for at, line in enumerate(lines, number):
            texts.append(_line(line, at))
    except RequestError:
        if texts:
            yield texts
        raise
    if texts:
        yield texts


def _line(data: bytes, number: int) -> str:
    return decoded(data.removeprefix(MARK) if number == 1 else data, number).removesuffix("\r")


def decoded(data: bytes, number: int, name: str = "stdin") -> str:
    """Text, whose first line has a number; raises RequestError naming the line and byte that are none."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, at = number + before.count(b"\n"), len(before) - before.rfind(b"\n")
        raise RequestError(
            f"{name} is not UTF-8: byte {at} of line {line} is 0x{data[error.start]:02x}",
            hint="convert it, for instance from Latin-1: iconv -f latin1 -t utf-8",
        ) from error


def check_stdin() -> None:
    """Raises RequestError when stdin is closed."""
    if sys.stdin is None:
        raise RequestError("stdin is closed, and - reads from it", hint="give it a file: < FILE")


def stdin_ready() -> bool:
    """Whether stdin can be read without waiting; False where that cannot be known."""
    try:
        return bool(select.select([sys.stdin], [], [], 0)[0])
    except (OSError, ValueError):  # no open file, or a system that can ask sockets alone
        return False


def _read() -> bytes:
    """The next bytes of stdin, as soon as there are any; none at its end."""
    check_stdin()
    try:
        # Not read(): that waits for as much as was asked for.
        return cast("io.BufferedReader", sys.stdin.buffer).read1(_CHUNK)
    except OSError as error:
        raise RequestError(f"stdin cannot be read: {error.strerror}", hint="give it a file: < FILE") from error


def _too_long(what: str) -> RequestError:
    return RequestError(
        f"{what} has more than {MAX_TEXT:,} bytes", hint="give shorter texts, each on a line of its own"
    )
