"""`lorax classify`: labels of inputs, or of their tokens, on stdout.

Decides how a command line says which head answers, and what is shown of its labels. Knows nothing of models: loading and
answering are those of the Python interface, imported when the command runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

import lorax_core
from lorax_core.cli.batches import Texts, answers, print_truncated
from lorax_core.cli.loading import Loading, ModelPath, loads_model
from lorax_core.cli.options import Truncate, UseAdapter, numbered_labels
from lorax_core.cli.render import Table, data_only_stdout, print_message, show_line
from lorax_core.types import Classification

if TYPE_CHECKING:
    from lorax_core.serving.engine import Engine

app = typer.Typer(add_completion=False)


class HeadTask(StrEnum):
    """What an adapter's head may be for; the values are those of `lorax_core.Task`."""

    TOKENS = "token-classification"
    TEXTS = "sequence-classification"


@app.command()
@loads_model
def classify(
    path: ModelPath,
    texts: Annotated[
        list[str], typer.Argument(metavar="TEXT", help="What to classify; a single - reads lines of stdin.")
    ],
    use: UseAdapter = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="ID=NAME", help="Name a label of that adapter's head; once for each label."),
    ] = None,
    task: Annotated[
        HeadTask | None, typer.Option(help="What that adapter's head is for, where its files do not say it.")
    ] = None,
    truncate: Annotated[
        Truncate, typer.Option(help="A text that is too long: refuse it, or cut its start or its end.")
    ] = Truncate.ERROR,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, a line for each text.")] = False,
    *,
    loading: Loading,
) -> None:
    """Classify texts, or the tokens of texts; a line of stdin is a text, an empty one too.

    A head that an adapter brings comes before that of the checkpoint.
    """
    adapters = loading.options_of(path)["adapters"]
    chosen = loading.chosen_adapter(path, use)
    about = _head_options(chosen, label, task)
    cut: Any = truncate.value  # a Literal there
    given = Texts(texts)

    def request(text: str) -> lorax_core.ClassifyRequest:
        return lorax_core.ClassifyRequest(input=text, adapter=chosen, truncate=cut)

    # The adapter whose head is described comes after: `load` takes sources alone, no labels and no task.
    first_loaded = {name: at for name, at in adapters.items() if not about or name != chosen}
    with loading.engine(path, adapters=first_loaded) as engine:
        if about:
            _load_head(engine, cast("str", chosen), adapters, about)
        columns: list[str] = []
        for first, found in answers(engine, given, request):
            if json:
                _show_lines(found, first)
            else:
                # All texts are answered by one head, so the first answer says what there is to show.
                if not columns:
                    columns = _columns(found[0])
                    table = Table(columns)
                table.add(_rows(found, first, columns))
            # Whoever reads a pipe has these while the next are computed.
            sys.stdout.flush()
            if not json:
                _print_empty(found, given, first)
            print_truncated(found, given, first)


def _head_options(
    chosen: str | dict[str, float] | None, labels: list[str] | None, task: HeadTask | None
) -> dict[str, Any]:
    """What is said of the head of the adapter that answers; it is a wrong command line when there is no such adapter."""
    named = numbered_labels(labels or [])
    said = {"id2label": named or None, "task": str(task) if task is not None else None}
    about = {name: value for name, value in said.items() if value is not None}
    # A weighted sum has no head of its own, and the base's is not to be renamed.
    if about and not isinstance(chosen, str):
        option = "--label" if named else "--task"
        message = "it is about the head of one adapter; --adapter NAME=FOLDER loads one, --use NAME chooses it"
        raise typer.BadParameter(message, param_hint=option)
    return about


def _load_head(engine: Engine, name: str, adapters: dict[str, str], about: dict[str, Any]) -> None:
    """The adapter that answers, with what is said of its head."""
    with data_only_stdout():
        engine.adapters.load(name, adapters[name], **about)


def _show_lines(answers: list[Classification], first: int) -> None:
    for index, answer in enumerate(answers, first):
        show_line(
            {
                "index": index,
                "tokens": answer.usage.prompt_tokens,
                "truncated": answer.truncated,
                "labels": list(_labels(answer)),
                "entities": _entities(answer) if answer.entities is not None else None,
            }
        )


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


def _rows(answers: list[Classification], first: int, columns: list[str]) -> Iterator[list[str]]:
    for index, answer in enumerate(answers, first):
        for row in _shown(answer):
            yield [str(index), *(_cell(row.get(name)) for name in columns[1:])]


def _print_empty(answers: list[Classification], texts: Texts, first: int) -> None:
    for index, answer in enumerate(answers, first):
        if not _shown(answer):
            print_message(f"{texts.name(index)}: nothing was found", style="dim")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return " ".join(str(value).split()) if value is not None else "-"  # one row is one line
