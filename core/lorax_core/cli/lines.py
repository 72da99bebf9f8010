"""Messages as they are typed or piped, a line each or several.

Decides what joins lines to one message, and what a terminal does for its user: editing, history and completion. Knows nothing
of what messages mean.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

from lorax_core.cli.streams import read_lines
from lorax_core.errors import RequestError

QUOTES: Final = '"""'
_MORE: Final = "... "

Complete = Callable[[str, str], list[str]]
"""What a word may become, by the line before it and the word."""


class Lines(Protocol):
    """Where lines come from."""

    def next(self, prompt: str) -> str | None:
        """The next line, without its end; None when there is none."""


class PipedLines:
    """The lines of stdin."""

    def __init__(self) -> None:
        self._lines: Iterator[str] = (line for some in read_lines() for line in some)

    def next(self, prompt: str) -> str | None:
        """The next line; None at the end."""
        return next(self._lines, None)


class TypedLines:
    """What a user types at a terminal; with editing and history where Python has readline."""

    def __init__(self, complete: Complete) -> None:
        try:
            import readline
        except ImportError:  # Windows, and some builds
            return
        readline.set_completer_delims(" \t\n")
        readline.set_completer(_completer(readline, complete))
        # libedit, which stands in for readline on macOS, has another language.
        edits = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if edits else "tab: complete")

    def next(self, prompt: str) -> str | None:
        """The next line; None after Ctrl-D."""
        try:
            line = input(prompt)
        except EOFError:
            # The terminal's next line is its own.
            print(file=sys.stderr)
            return None
        try:
            line.encode()
            return line
        except UnicodeEncodeError:  # Python marks bytes that the locale does not have; fsencode gives them back
            try:
                return os.fsencode(line).decode()
            except UnicodeError as error:
                raise RequestError("the line is not UTF-8", hint="set the terminal to UTF-8") from error


def read_message(lines: Lines, prompt: str) -> str | None:
    """The next message; None when there is none. A backslash at its end, or triple quotes around it, join lines."""
    line = lines.next(prompt)
    if line is None:
        return None
    if line.lstrip().startswith(QUOTES):
        return _quoted(lines, line.lstrip().removeprefix(QUOTES))
    parts = [line]
    while parts[-1].endswith("\\"):
        parts[-1] = parts[-1].removesuffix("\\")
        following = lines.next(_MORE)
        if following is None:
            break
        parts.append(following)
    return "\n".join(parts)


def _quoted(lines: Lines, first: str) -> str:
    """Up to a line that ends with the quotes; their own lines may be empty."""
    parts, line = [], first
    while not line.rstrip().endswith(QUOTES):
        parts.append(line)
        following = lines.next(_MORE)
        if following is None:
            return "\n".join(parts).removeprefix("\n")
        line = following
    last = line.rstrip().removesuffix(QUOTES)
    # Quotes on lines of their own add no empty lines.
    return "\n".join([*parts, *([last] if last or not parts else [])]).removeprefix("\n")


def _completer(readline: Any, complete: Complete) -> Callable[[str, int], str | None]:
    def completed(word: str, state: int) -> str | None:
        found = complete(readline.get_line_buffer()[: readline.get_begidx()], word)
        return found[state] if state < len(found) else None

    return completed
