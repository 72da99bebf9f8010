"""How commands talk: tables and JSON on stdout, warnings and errors on stderr.

Decides the looks. Knows nothing of what is shown beyond rows of text, errors, and the records of plugins.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from lorax_core.errors import LoraxError
    from lorax_core.plugins.record import PluginRecord

SCHEMA: Final = 1
"""Version of the shape of all JSON that commands print; a field may be added without raising it."""

_STYLES: Final = {
    "ready": "green",
    "slow-import": "yellow",
    "incompatible": "red",
    "conflict": "red",
    "broken": "red",
    "blocked": "dim",
    "passed": "green",
    "failed": "red",
    "known": "yellow",
    "skipped": "dim",
}


def data_only_stdout() -> contextlib.redirect_stdout[Any]:
    """While plugins are imported: what they print goes to stderr and does not spoil the data."""
    return contextlib.redirect_stdout(sys.stderr)


def show_json(data: dict[str, Any]) -> None:
    """One JSON object on stdout, with its schema version first."""
    print(json.dumps({"schema": SCHEMA, **data}, indent=2))


def show_line(data: dict[str, Any]) -> None:
    """One JSON object on a line of stdout, with its schema version first."""
    print(json_line(data))


def json_line(data: dict[str, Any]) -> str:
    """One JSON object without line breaks, with its schema version first."""
    return json.dumps({"schema": SCHEMA, **data})


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A whole table on stdout."""
    Table(columns).add(rows)


class Table:
    """A table on stdout, written as its rows come.

    For people on a terminal; in a pipe plain columns, neither wrapped nor coloured.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = columns
        # Tables of names and values have empty headings, which are left out.
        self._headed = any(columns)
        self._widths = [len(name) for name in columns]

    def add(self, rows: Iterable[Sequence[str]]) -> None:
        """Writes rows, below the headings when they are the first. A column is as wide as it was, or wider."""
        # Rows may be a generator, and are read twice.
        lines = [[printable(cell) for cell in row] for row in rows]
        if sys.stdout.isatty():
            _show_rich_table(self._columns, lines, self._headed)
        else:
            shown = [[name.upper() for name in self._columns], *lines] if self._headed else lines
            self._widths = [max([width, *map(len, cells)]) for width, *cells in zip(self._widths, *lines, strict=True)]
            for row in shown:
                cells = [cell.ljust(width) for cell, width in zip(row, self._widths, strict=True)]
                print("  ".join(cells).rstrip())
        self._headed = False


def printable(text: str) -> str:
    """Text with its line breaks, and whatever else a terminal would interpret, as escapes: names come from anybody's files."""
    return text if text.isprintable() else "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def _show_rich_table(columns: Sequence[str], rows: list[list[str]], headed: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Without rules: seven columns must fit on 80 characters, and what does not fit folds but is never cut off.
    table = Table(box=None, show_header=headed, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        # Text, not str: rich would read [brackets] in a cell as markup.
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    Console().print(table)


def print_message(message: str, hint: str | None = None, *, label: str = "", style: str = "") -> None:
    """A message on stderr, its label coloured on a terminal, its hint below."""
    from rich.console import Console
    from rich.text import Text

    # Line by line: some messages have several.
    message = "\n".join(map(printable, message.split("\n")))
    text = Text.assemble((f"{label}: " if label else "", f"bold {style}"), message)
    if hint is not None:
        text.append_text(Text.assemble("\n  ", ("hint: ", "bold"), printable(hint)))
    # Soft: a path or a command must stay whole when it is copied.
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)


def print_error(error: LoraxError) -> None:
    """An error on stderr: what failed, and the next thing to do."""
    print_message(error.message, error.hint, label="error", style="red")


def print_problems(records: Iterable[PluginRecord]) -> None:
    """On stderr, each plugin that failed, or is slow to import, with its cause."""
    for record in records:
        if record.status.failed or record.status == "slow-import":
            print_message(record.verdict, record.hint, label="warning", style="yellow")


def problem_json(record: PluginRecord) -> dict[str, Any]:
    """One entry of "problems" in the commands' JSON."""
    return {
        "plugin": record.name,
        "package": record.package,
        "version": record.version,
        "status": str(record.status),
        "cause": record.cause,
        "hint": record.hint,
    }
