"""Texts of a command line, or lines of stdin, to answers: in batches of bounded size, in order, as they come.

Decides how many texts are answered together, and how an error names its text. Knows nothing of what is asked of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

import typer

from lorax_core.cli.render import print_message
from lorax_core.cli.streams import check_stdin, read_lines
from lorax_core.errors import LoraxError

if TYPE_CHECKING:
    from lorax_core.serving.engine import Engine
    from lorax_core.serving.requests import Request
    from lorax_core.types import Classification, Embedding

BATCH: Final = 256
"""How many texts are answered together: the rows of a step, by default."""


def as_text(argument: str, where: str = "TEXT") -> str:
    """An argument as text: by the locale, or else in UTF-8. What is neither is a wrong command line."""
    try:
        argument.encode()
        return argument
    except UnicodeEncodeError:  # Python marks bytes that the locale does not have; fsencode gives them back
        try:
            return os.fsencode(argument).decode()
        except UnicodeError as error:
            raise typer.BadParameter(f"{argument!r:.80} is not UTF-8", param_hint=where) from error


class Texts:
    """The texts of a command line, or for a single - the lines of stdin, which are read when they are asked for."""

    def __init__(self, given: list[str]) -> None:
        self.from_stdin = given == ["-"]
        # What is wrong with them is known before anything is loaded.
        self._given = [] if self.from_stdin else [as_text(text) for text in given]
        if self.from_stdin:
            check_stdin()

    def batches(self) -> Iterator[list[str]]:
        """At most `BATCH` texts at a time, and of stdin no more than there are without waiting."""
        parts: Iterable[list[str]] = read_lines() if self.from_stdin else [self._given]
        for part in parts:
            yield from (part[start : start + BATCH] for start in range(0, len(part), BATCH))

    def name(self, index: int) -> str:
        """What messages call a text."""
        return f"line {index + 1}" if self.from_stdin else f"text {index}"


def answers(engine: Engine, texts: Texts, request: Callable[[str], Request]) -> Iterator[tuple[int, list[Any]]]:
    """Answers, a batch at a time, each with the index of its first text. An error comes after the answers before it."""
    first = 0
    for batch in texts.batches():
        requests = [request(text) for text in batch]
        try:
            found = engine.run(requests)
        except LoraxError:
            yield from _one_by_one(engine, texts, requests, first)
        else:
            yield first, found
        first += len(batch)


def _one_by_one(engine: Engine, texts: Texts, requests: list[Request], first: int) -> Iterator[tuple[int, list[Any]]]:
    """The answers of a batch that failed, until the one that cannot be given: the error names its text."""
    for index, one in enumerate(requests, first):
        try:
            found = engine.run([one])
        except LoraxError as error:
            if len(requests) == 1 and not texts.from_stdin:  # there is only one that it can be
                raise
            raise LoraxError(f"{texts.name(index)}: {error.message}", hint=error.hint) from error
        yield index, found


def print_truncated(answers: Iterable[Embedding | Classification], texts: Texts, first: int) -> None:
    """On stderr, each text that was cut."""
    for index, answer in enumerate(answers, first):
        if answer.truncated:
            message = f"{texts.name(index)} was cut to {answer.usage.prompt_tokens} tokens"
            print_message(message, label="warning", style="yellow")
