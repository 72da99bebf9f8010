"""Reading what anybody may have written.

Decides what is refused before it is parsed: names that leave their folder, files that are none, JSON that is too large, too
deep or no valid text; and that whatever else goes wrong while something untrusted is read becomes one error of ours. Knows
nothing of what the files mean. The one gate: checkpoints, adapters, tokenizers and templates are read through it.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeGuard

from lorax_core.errors import LoraxError, plain

JSON_BYTES: Final = 64 * 2**20
"""The largest JSON file that is read: ten times the largest index and configuration in use."""
JSON_DEPTH: Final = 100
JSON_VALUES: Final = 4_000_000


def file_in(folder: Path, name: object, kind: type[LoraxError]) -> Path:
    """The path of `name` in a folder, when `name` is a relative path that stays inside.

    Links are not followed: a hub's snapshot is links to its `blobs/`. Raises `kind`, naming folder and name.
    """
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        raise kind(
            f"'{folder}' names the file {name!r:.120}, which is not a file name", hint="download or copy it again"
        )
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise kind(
            f"'{folder}' names the file {name!r:.120}, which lies outside that folder",
            hint="the files of a checkpoint or adapter lie in its own folder: do not use this one",
        )
    return folder / relative


def regular(file: Path, kind: type[LoraxError]) -> int:
    """The size in bytes of a regular file, links followed; raises `kind` for a pipe, device or folder, and if there is none."""
    with guarded(kind, f"'{file}' cannot be read", hint="download or copy it again"):
        found = file.stat()
    # Opening a pipe blocks until somebody writes, and a device may have no end.
    if not stat.S_ISREG(found.st_mode):
        raise kind(f"'{file}' is not a regular file", hint="replace it by the file itself")
    return found.st_size


def read_json(file: Path, kind: type[LoraxError], limit: int = JSON_BYTES) -> Any:
    """The value of a JSON file of at most `limit` bytes; raises `kind`, naming the file and what is wrong with it."""
    again = "download or copy it again"
    size = regular(file, kind)
    if size > limit:
        raise kind(f"'{file}' has {size:,} bytes; at most {limit:,} are read", hint=again)
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors on Windows put a mark first
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise kind(
            f"'{file}' is not JSON: {error.msg} in line {error.lineno}, column {error.colno}", hint=again
        ) from error
    # ValueError: a number of more digits than Python converts; RecursionError: json's parser recurses.
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        cause = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise kind(f"'{file}' cannot be read: {cause}", hint=again) from error
    problem = unusable(found)
    if problem is not None:
        raise kind(f"'{file}' {problem}", hint=again)
    return found


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number, and neither a truth value nor an integer that no float holds."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


@contextmanager
def guarded(kind: type[LoraxError], message: str, hint: str | None = None) -> Iterator[None]:
    """Any exception inside that is no LoraxError becomes `kind`: "{message}: {type}: {what it says}"."""
    try:
        yield
    except LoraxError:
        raise
    except BaseException as error:
        # A panic of a library in Rust is no Exception, and pyo3 exports no class of it to catch.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{message}: {type(error).__name__}: {plain(error)[:500]}", hint=hint) from error


def unusable(value: object) -> str | None:
    """What makes a value unusable that came as JSON ("holds ..."), None when nothing does."""
    level, count = [value], 0
    for _ in range(JSON_DEPTH):
        if not level:
            return None
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [*item, *item.values()]
            elif isinstance(item, (list, tuple)):
                # Token ids: nothing to look at but how many they are, and too many to look at each. One stands for all.
                if type(item) in (list, tuple) and _NUMBERS.issuperset(map(type, item)):
                    below += item[:1]
                    count += max(len(item) - 1, 0)
                else:
                    below += item
            # Half of a pair: valid JSON, but no text, so nothing can print, encode or hash it.
            elif isinstance(item, str) and not _is_text(item):
                return f"holds {item!r:.60}, which is not valid Unicode"
            # In Python one list may stand in another twice, and so on: a few levels down it is there a million times.
            if len(below) + count > JSON_VALUES:
                return f"holds more than {JSON_VALUES:,} values"
        level = below
        count += len(below)
    return f"is nested more than {JSON_DEPTH} levels deep" if level else None


_NUMBERS = frozenset((int, float))


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
