"""What commands that ask a model have in common: adapters by name, a prompt, and texts that are too long.

Decides how `--adapter`, `--use`, `--truncate` and `-` are read. Knows nothing of models or of what adapters
hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated

import typer

from lorax_core.cli.batches import as_text
from lorax_core.cli.streams import read_prompt
from lorax_core.errors import AdapterError, listed, nearest, shown

UseAdapter = Annotated[
    str | None,
    typer.Option(
        "--use",
        metavar="NAME",
        help="The adapter that answers, or a weighted sum: a=0.7,b=0.3. One that --adapter loads alone is used.",
    ),
]


class Truncate(StrEnum):
    """What happens to a text that is too long; the values are those of `EmbedRequest` and `ClassifyRequest`."""

    ERROR = "error"
    START = "start"
    END = "end"


def named_sources(given: Iterable[str]) -> dict[str, str]:
    """Adapters by name; a wrong or repeated `NAME=FOLDER` is a wrong command line."""
    sources: dict[str, str] = {}
    for one in given:
        name, equals, source = one.partition("=")
        if not (name and equals and source):
            raise typer.BadParameter(f"{one!r} is not NAME=SOURCE", param_hint="--adapter")
        if name in sources:
            raise typer.BadParameter(f"two adapters are called {name!r}", param_hint="--adapter")
        sources[name] = source
    return sources


def numbered_labels(given: Iterable[str], form: str = "ID=NAME") -> dict[int, str]:
    """Labels by number, each given as `ID=NAME`; `form` is how the command line has it."""
    named: dict[int, str] = {}
    for one in given:
        index, equals, name = one.partition("=")
        # No head has labels of more digits.
        if not (index.isascii() and index.isdecimal() and len(index) < 10 and equals and name):
            raise typer.BadParameter(f"{shown(one)} is not {form}", param_hint="--label")
        if int(index) in named:
            raise typer.BadParameter(f"label {int(index)} has two names", param_hint="--label")
        named[int(index)] = as_text(name, "--label")
    return named


def chosen_adapter(
    adapters: dict[str, str], use: str | None, otherwise: str | None = None
) -> str | dict[str, float] | None:
    """The adapter that answers: the one asked for, or a weighted sum, or the only one there is; None for the base.

    `otherwise` is the hint for a name that is like none of them.
    """
    if use is None and len(adapters) > 1:
        raise typer.BadParameter(f"which of {listed(adapters)} answers?", param_hint="--use")
    if use is None:
        return next(iter(adapters), None)
    weights: dict[str, float] = {}
    for one in use.split(","):
        name, equals, weight = one.partition("=")
        if name not in adapters:
            close = nearest(name, adapters)
            raise AdapterError(
                f"no adapter is called {name!r}; given are {listed(adapters)}",
                hint=f"did you mean {close!r}?" if close else otherwise or f"--adapter {name}=FOLDER loads it",
            )
        # A later one would silently win in a dict.
        if name in weights:
            raise typer.BadParameter(f"{name!r} has two weights", param_hint="--use")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError as error:
            raise typer.BadParameter(f"{one!r} is not NAME=WEIGHT", param_hint="--use") from error
    # A bare name stays a name: a sum of one adapter would take a slot of its own.
    return use if use in adapters else weights


def read_text(given: str) -> str:
    """The text itself, or for - all of stdin without its last line break."""
    return read_prompt() if given == "-" else as_text(given, "PROMPT")
