"""Texts of a command line, or lines of stdin, to answers: in batches of bounded size, in order, as they come.

Decides how many texts are answered together, that a batch is tokenised while the one before it is computed, and how an error
names its text. Knows nothing of what is asked of them.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, Protocol

import typer

from lorax_core.cli.render import print_message
from lorax_core.cli.streams import check_stdin, read_lines, stdin_ready
from lorax_core.errors import LoraxError

if TYPE_CHECKING:
    from lorax_core.serving.call import Call
    from lorax_core.serving.engine import Engine
    from lorax_core.serving.requests import Request
    from lorax_core.types import Classification, Embedding, Relevance

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

    def batches(self) -> Iterator[tuple[list[str], bool]]:
        """At most `BATCH` texts at a time, of stdin those that are there, if any; and whether more can be had without waiting.

        An error comes after a batch that says that no more are.
        """
        parts: Iterable[list[str]] = read_lines() if self.from_stdin else [self._given]
        try:
            for part in parts:
                last = max(len(part) - 1, 0) // BATCH * BATCH
                yield from ((part[start : start + BATCH], True) for start in range(0, last, BATCH))
                yield part[last:], self.from_stdin and stdin_ready()
        except LoraxError:
            yield [], False
            raise

    def name(self, index: int) -> str:
        """What messages call a text."""
        return f"line {index + 1}" if self.from_stdin else f"text {index}"


def answers(engine: Engine, texts: Texts, request: Callable[[str], Request]) -> Iterator[tuple[int, list[Any]]]:
    """Answers, a batch at a time, each with the index of its first text. An error comes after the answers before it.

    A batch is submitted while the one before it is computed, unless its texts would have to be waited for.
    """
    first = 0
    submitted: deque[tuple[int, list[Request], Call | None]] = deque()
    for batch, more in texts.batches():
        if batch:
            requests = [request(text) for text in batch]
            submitted.append((first, requests, _submit(engine, requests)))
            first += len(batch)
        while len(submitted) > (1 if more else 0):
            yield from _results(engine, texts, *submitted.popleft())
    while submitted:  # stdin ended although more had been announced: its end can be read as well
        yield from _results(engine, texts, *submitted.popleft())


def _submit(engine: Engine, requests: list[Request]) -> Call | None:
    """The call of a batch; None where a request is refused, which is told when the answers before it are given."""
    try:
        return engine.submit(requests)
    except LoraxError:
        return None


def _results(
    engine: Engine, texts: Texts, first: int, requests: list[Request], call: Call | None
) -> Iterator[tuple[int, list[Any]]]:
    try:
        found = call.wait() if call is not None else None
    except LoraxError:
        found = None
    if found is None:
        yield from _one_by_one(engine, texts, requests, first)
    else:
        yield first, found


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


class NamedTexts(Protocol):
    """Texts that messages name."""

    def name(self, index: int) -> str:
        """What messages call a text."""


def print_truncated(answers: Iterable[Embedding | Classification | Relevance], texts: NamedTexts, first: int) -> None:
    """On stderr, each text that was cut."""
    for index, answer in enumerate(answers, first):
        if answer.truncated:
            message = f"{texts.name(index)} was cut to {answer.usage.prompt_tokens} tokens"
            print_message(message, label="warning", style="yellow")
