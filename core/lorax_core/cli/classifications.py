"""How commands show labels: as JSON, in a table, or in the text itself.

Decides the looks. Knows nothing of what was asked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from lorax_core.cli.records import TextRecord
from lorax_core.cli.render import Table, printable
from lorax_core.types import Classification, Entity

if TYPE_CHECKING:
    from rich.text import Text

_COLOURS: Final = ("cyan", "magenta", "yellow", "green", "blue", "red")


class ShownLabels:
    """Answers as they come: entities within their texts on a terminal, and else rows of a table.

    All are of one head, so the first says what there is to show.
    """

    def __init__(self, *, numbered: bool) -> None:
        """`numbered` puts its index before each text."""
        self._numbered = numbered
        self._colours: dict[str, str] = {}
        self._columns: list[str] = []
        self._table: Table | None = None

    def add(self, records: Sequence[TextRecord], answers: Sequence[Classification]) -> None:
        """Shows some more."""
        if answers[0].entities is not None and sys.stdout.isatty():
            self._show_texts(records, answers)
            return
        if self._table is None:
            self._columns = _columns(answers[0])
            self._table = Table(self._columns)
        self._table.add(_rows(answers, records[0].line - 1, self._columns))

    def _show_texts(self, records: Sequence[TextRecord], answers: Sequence[Classification]) -> None:
        from rich.console import Console
        from rich.text import Text

        console = Console(highlight=False)
        for record, answer in zip(records, answers, strict=True):
            number = Text(f"{record.line - 1}  " if self._numbered else "", style="dim")
            console.print(Text.assemble(number, entities_in(record.text, answer.entities or [], self._colours)))


def entities_in(text: str, entities: Sequence[Entity], colours: dict[str, str]) -> Text:
    """A text with its entities marked and named: colour is not the only sign. `colours` by label are filled as labels come."""
    from rich.text import Text

    shown, at = Text(), 0
    for entity in sorted(entities, key=lambda one: one.start):
        colour = colours.setdefault(entity.label, _COLOURS[len(colours) % len(_COLOURS)])
        shown.append(_shown_part(text[at : entity.start]))
        shown.append(_shown_part(text[entity.start : entity.end]), style=f"bold underline {colour}")
        shown.append(printable(f"[{entity.label} {entity.score:.2f}]"), style=colour)
        at = entity.end
    return shown.append(_shown_part(text[at:]))


def _shown_part(text: str) -> str:
    """A part of a text with its line breaks, and with escapes for what a terminal would obey."""
    return "\n".join(map(printable, text.split("\n")))


def answer_json(index: int, answer: Classification, id: Any = None) -> dict[str, Any]:
    """All that is known of an answer."""
    return {
        "index": index,
        **({"id": id} if id is not None else {}),
        "tokens": answer.usage.prompt_tokens,
        "truncated": answer.truncated,
        "labels": list(_labels(answer)),
        "entities": _entities(answer) if answer.entities is not None else None,
    }


def is_empty(answer: Classification) -> bool:
    """Whether there is nothing to show of an answer."""
    return not _shown(answer)


def _labels(answer: Classification) -> list[dict[str, Any]]:
    """The labels with their scores; of tokens also the token and where it stands."""
    rows: list[dict[str, Any]] = [
        {"label": label, "score": score} for label, score in zip(answer.labels, answer.scores, strict=True)
    ]
    # Not strict: of a whole text there are labels and no tokens.
    for row, token in zip(rows, answer.tokens or [], strict=False):
        row["token"] = token
    for row, (start, end) in zip(rows, answer.offsets or [], strict=False):
        row |= {"start": start, "end": end}
    return rows


def _entities(answer: Classification) -> list[dict[str, Any]]:
    return [
        {"label": one.label, "score": one.score, "text": one.text, "start": one.start, "end": one.end}
        for one in answer.entities or []
    ]


def _shown(answer: Classification) -> list[dict[str, Any]]:
    """Entities where labels make entities, else tokens, else labels of a text."""
    return _labels(answer) if answer.entities is None else _entities(answer)


def _columns(answer: Classification) -> list[str]:
    if answer.entities is not None:
        return ["index", "label", "score", "text", "start", "end"]
    # Of a text without tokens, only the (empty) offsets say that tokens were asked for.
    of_tokens = answer.tokens is not None or answer.offsets is not None
    offsets = ["start", "end"] if answer.offsets is not None else []
    return ["index", "label", "score", *(["token"] if of_tokens else []), *offsets]


def _rows(answers: Sequence[Classification], first: int, columns: list[str]) -> Iterator[list[str]]:
    for index, answer in enumerate(answers, first):
        for row in _shown(answer):
            yield [str(index), *(_cell(row.get(name)) for name in columns[1:])]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return " ".join(str(value).split()) if value is not None else "-"  # one row is one line
