"""`lorax classify`: labels of inputs, or of their tokens, on stdout.

Decides how a command line says which head answers, and what is shown of its labels. Knows nothing of models: loading and
answering are those of the Python interface, imported when the command runs.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

import lorax_core
from lorax_core.cli.options import Truncate, chosen_adapter, named_sources, print_truncated, read_texts
from lorax_core.cli.render import SCHEMA, data_only_stdout, print_message, show_table

if TYPE_CHECKING:
    from lorax_core.serving.engine import Engine
    from lorax_core.types import Classification

app = typer.Typer(add_completion=False)


class HeadTask(StrEnum):
    """What an adapter's head may be for; the values are those of `lorax_core.Task`."""

    TOKENS = "token-classification"
    TEXTS = "sequence-classification"


@app.command()
def classify(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint: a folder, or an id on the hub.")],
    texts: Annotated[
        list[str], typer.Argument(metavar="TEXT", help="What to classify; a single - reads lines of stdin.")
    ],
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="Load an adapter; may be given several times.")
    ] = None,
    use: Annotated[
        str | None, typer.Option(metavar="NAME", help="The adapter that answers. One given alone is used.")
    ] = None,
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
) -> None:
    """Classify texts, or the tokens of texts, all in one batch.

    A head that an adapter brings comes before that of the checkpoint.
    """
    adapters = named_sources(adapter or [])
    chosen = chosen_adapter(adapters, use)
    about = _head_options(chosen, label, task)
    cut: Any = truncate.value  # a Literal there
    requests = [lorax_core.ClassifyRequest(input=text, adapter=chosen, truncate=cut) for text in read_texts(texts)]
    with data_only_stdout():
        # The adapter whose head is described comes after: `load` takes sources alone, no labels and no task.
        engine = lorax_core.load(
            path, adapters={name: at for name, at in adapters.items() if not about or name != chosen}
        )
    with engine:
        if about:
            _load_head(engine, cast("str", chosen), adapters, about)
        answers = cast("list[Classification]", engine.run(requests))
    if json:
        _show_lines(answers)
    else:
        _show_table(answers)
    print_truncated(answers)


def _head_options(
    chosen: str | dict[str, float] | None, labels: list[str] | None, task: HeadTask | None
) -> dict[str, Any]:
    """What is said of the head of the adapter that answers; it is a wrong command line when there is no such adapter."""
    named: dict[int, str] = {}
    for one in labels or []:
        index, equals, name = one.partition("=")
        if not (index.isdecimal() and equals and name):
            raise typer.BadParameter(f"{one!r} is not ID=NAME", param_hint="--label")
        if int(index) in named:
            raise typer.BadParameter(f"label {int(index)} has two names", param_hint="--label")
        named[int(index)] = name
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


def _show_lines(answers: list[Classification]) -> None:
    """One JSON object a line, so that a long list can be read while it arrives."""
    from json import dumps

    for index, answer in enumerate(answers):
        line = {
            "schema": SCHEMA,
            "index": index,
            "tokens": answer.usage.prompt_tokens,
            "truncated": answer.truncated,
            "labels": list(_labels(answer)),
            "entities": _entities(answer) if answer.entities is not None else None,
        }
        print(dumps(line))


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


def _show_table(answers: list[Classification]) -> None:
    """A row for each entity where labels make entities, else for each token, else for each label of a text."""
    columns = ["index", "label", "score"]
    # One answer with entities is enough: all texts were answered by the same head.
    if any(answer.entities is not None for answer in answers):
        found = [_entities(answer) for answer in answers]
        columns += ["text", "start", "end"]
    else:
        found = [_labels(answer) for answer in answers]
        columns += [name for name in ("token", "start", "end") if any(name in row for rows in found for row in rows)]
    lines = [
        [str(index), *(_cell(row.get(name)) for name in columns[1:])]
        for index, rows in enumerate(found)
        for row in rows
    ]
    show_table(columns, lines)
    for index, rows in enumerate(found):
        if not rows:
            print_message(f"text {index}: nothing was found", style="dim")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return " ".join(str(value).split()) if value is not None else "-"  # one row is one line
