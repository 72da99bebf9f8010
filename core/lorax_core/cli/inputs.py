"""Texts of a command line, of stdin or of a file, to answers with their texts.

Decides which of them a command was given. Knows nothing of what is asked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorax_core.cli.batches import Texts, answers
from lorax_core.cli.files import file_answers
from lorax_core.cli.records import Bounds, RecordFile, TextRecord

if TYPE_CHECKING:
    from lorax_core.serving.engine import Engine
    from lorax_core.serving.requests import Request


def given_texts(
    texts: list[str] | None, file: Path | None, field: str | None, *, name: str = "TEXT", bounds: Bounds | None = None
) -> Texts | RecordFile:
    """What a command line gives. Raises BadParameter for nothing, for both, and RequestError for what cannot be read."""
    if bool(texts) == (file is not None):
        message = f"give a {name} or several, a single - for lines of stdin, or --file FILE"
        raise typer.BadParameter(message, param_hint=name)
    if file is None:
        if field is not None:
            raise typer.BadParameter("it needs --file FILE", param_hint="--field")
        return Texts(texts or [])
    given = RecordFile(file, field, bounds or Bounds())
    given.check()
    return given


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
