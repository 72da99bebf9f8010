"""Texts of a command line, of stdin or of a file, to answers with their texts.

Decides which of them a command was given, and when answers can go to a file. Knows nothing of what is asked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorax_core.cli.batches import Texts, answers
from lorax_core.cli.files import file_answers
from lorax_core.cli.records import Bounds, RecordFile, TextRecord
from lorax_core.errors import listed

if TYPE_CHECKING:
    from lorax_core.serving.engine import Engine
    from lorax_core.serving.requests import Request


def given_file(file: Path | None, field: str | None, bounds: Bounds | None = None) -> RecordFile | None:
    """The file that a command line gives, if any. Raises BadParameter, and RequestError for one that cannot be read."""
    if file is None:
        if field is not None:
            raise typer.BadParameter("it needs --file FILE", param_hint="--field")
        return None
    given = RecordFile(file, field, bounds or Bounds())
    given.check()
    return given


def given_texts(
    texts: list[str] | None, file: Path | None, field: str | None, *, name: str = "TEXT"
) -> Texts | RecordFile:
    """What a command line gives. Raises BadParameter for nothing, for both, and RequestError for what cannot be read."""
    if bool(texts) == (file is not None):
        message = f"give a {name} or several, a single - for lines of stdin, or --file FILE, and one of them alone"
        raise typer.BadParameter(message, param_hint=name)
    return given_file(file, field) or Texts(texts or [])


def check_out(
    out: Path | None,
    endings: Sequence[str],
    given: Texts | RecordFile | None,
    *,
    json: bool,
    overwrite: bool,
    restart: bool,
) -> None:
    """Raises BadParameter for a file of answers that cannot be, or options of one where there is none."""
    wrong: tuple[str, str] | None = None
    if out is None:
        if overwrite or restart:
            wrong = "--overwrite" if overwrite else "--restart", "it is about the file of --out FILE"
    elif not isinstance(given, RecordFile):
        wrong = "--out", "it needs --file FILE; --file - reads lines of stdin"
    elif out.suffix not in endings:
        wrong = "--out", f"{out.name!r} ends in none of {listed(endings)}"
    elif json:
        wrong = "--json", f"it is about stdout; --out {out.stem}.jsonl writes JSON"
    if wrong is not None:
        raise typer.BadParameter(wrong[1], param_hint=wrong[0])


def given_answers(
    engine: Engine, given: Texts | RecordFile, request: Callable[[str], Request]
) -> Iterator[tuple[list[TextRecord], list[Any]]]:
    """Answers in order, some at a time, with the texts that they belong to. An error comes after the answers before it."""
    if isinstance(given, RecordFile):
        for window, found in file_answers(engine, given, lambda record: request(record.text)):
            yield window.records, found
        return
    asked: deque[str] = deque()

    def remembered(text: str) -> Request:
        asked.append(text)
        return request(text)

    for first, found in answers(engine, given, remembered):
        yield [TextRecord(line, asked.popleft()) for line in range(first + 1, first + 1 + len(found))], found
