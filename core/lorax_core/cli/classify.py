"""`lorax classify`: labels of inputs, or of their tokens, on stdout or in a file.

Decides how a command line says which head answers. Knows nothing of models: loading and answering are those of the Python
interface, imported when the command runs.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

import typer

import lorax_core
from lorax_core.cli.batches import Texts, print_truncated
from lorax_core.cli.classifications import ShownLabels, answer_json, is_empty
from lorax_core.cli.files import Field, InFile, Overwrite, Restart, job_of, refuse_same, write_answers
from lorax_core.cli.inputs import check_out, given_answers, given_texts
from lorax_core.cli.loading import Loading, ModelPath, loads_model
from lorax_core.cli.options import Truncate, UseAdapter, numbered_labels
from lorax_core.cli.records import RecordFile, TextRecord
from lorax_core.cli.render import json_line, print_message, show_line
from lorax_core.cli.resuming import NoHead, PartFile
from lorax_core.types import Classification

if TYPE_CHECKING:
    from lorax_core.serving.engine import Engine

app = typer.Typer(add_completion=False)


_LINES: Final = ".jsonl"


class HeadTask(StrEnum):
    """What an adapter's head may be for; the values are those of `lorax_core.Task`."""

    TOKENS = "token-classification"
    TEXTS = "sequence-classification"


class ProblemType(StrEnum):
    """What the numbers of an adapter's head mean; the values are those of `problem_type` in a config.json."""

    REGRESSION = "regression"
    SINGLE_LABEL = "single_label_classification"
    MULTI_LABEL = "multi_label_classification"


_OutFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write .jsonl. The same command line again continues what was interrupted.",
        rich_help_panel="Files",
    ),
]


@app.command()
@loads_model
def classify(
    path: ModelPath,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Texts to classify; a single - reads lines of stdin.")
    ] = None,
    use: UseAdapter = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="ID=NAME", help="Name a label of that adapter's head; once for each label."),
    ] = None,
    task: Annotated[
        HeadTask | None, typer.Option(help="What that adapter's head is for, where its files do not say it.")
    ] = None,
    problem_type: Annotated[
        ProblemType | None, typer.Option(help="What the numbers of that head mean, where its files do not say it.")
    ] = None,
    truncate: Annotated[
        Truncate, typer.Option(help="A text that is too long: refuse it, or cut its start or its end.")
    ] = Truncate.ERROR,
    file: InFile = None,
    field: Field = None,
    out: _OutFile = None,
    overwrite: Overwrite = False,
    restart: Restart = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, a line for each text.")] = False,
    *,
    loading: Loading,
) -> None:
    """Classify texts, or the tokens of texts; a line of stdin or of a file is a text, an empty one too.

    A head that an adapter brings comes before that of the checkpoint. At a terminal entities are marked in their texts.
    """
    given = given_texts(texts, file, field)
    chosen = loading.chosen_adapter(path, use)
    about = _head_options(chosen, label, task, problem_type)
    job = _ClassifyJob(loading, path, chosen, about, truncate.value)
    check_out(out, (_LINES,), given, json=json, overwrite=overwrite, restart=restart)
    if out is None:
        _show(job, given, json=json, several=texts is None or len(texts) > 1 or texts == ["-"])
    else:
        _write(job, cast("RecordFile", given), out, overwrite=overwrite, restart=restart)


@dataclass(frozen=True, slots=True)
class _ClassifyJob:
    """A model, the adapter that answers, what is said of its head, and what happens to long texts."""

    loading: Loading
    path: str
    adapter: str | dict[str, float] | None
    about: dict[str, Any]
    truncate: Any  # a Literal there

    def request(self, text: str) -> lorax_core.ClassifyRequest:
        """What is asked of a text."""
        return lorax_core.ClassifyRequest(input=text, adapter=self.adapter, truncate=self.truncate)

    def engine(self) -> AbstractContextManager[Engine]:
        """The engine of the model, with the adapter's head as it was described."""
        about = {cast("str", self.adapter): self.about} if self.about else {}
        return self.loading.engine(self.path, about=about)


def _show(job: _ClassifyJob, given: Texts | RecordFile, *, json: bool, several: bool) -> None:
    shown = ShownLabels(numbered=several)
    with job.engine() as engine:
        for records, found in given_answers(engine, given, job.request):
            first = records[0].line - 1
            if json:
                for record, answer in zip(records, found, strict=True):
                    show_line(answer_json(record.line - 1, answer, record.id))
            else:
                shown.add(records, found)
            # The reader of a pipe has these while the next are computed.
            sys.stdout.flush()
            if not json:
                _print_empty(found, given, first)
            print_truncated(found, given, first)


def _write(job: _ClassifyJob, given: RecordFile, out: Path, *, overwrite: bool, restart: bool) -> None:
    refuse_same(given, out)
    said = {"use": job.adapter, "truncate": job.truncate, "label": job.about.get("id2label")}
    said |= {name: job.about.get(name) for name in ("task", "problem_type")}
    part = PartFile(out, job_of(job.loading, job.path, given, **said), overwrite=overwrite, restart=restart)

    def encode(records: list[TextRecord], found: list[Classification]) -> bytes:
        lines = (answer_json(one.line - 1, answer, one.id) for one, answer in zip(records, found, strict=True))
        return "".join(f"{json_line(line)}\n" for line in lines).encode()

    with job.engine() as engine:
        write_answers(engine, given, lambda record: job.request(record.text), part, NoHead(), encode)


def _head_options(
    chosen: str | dict[str, float] | None,
    labels: list[str] | None,
    task: HeadTask | None,
    problem: ProblemType | None,
) -> dict[str, Any]:
    """What is said of the head of the adapter that answers; it is a wrong command line when there is no such adapter."""
    said: dict[str, Any] = {"id2label": numbered_labels(labels or []) or None}
    said |= {name: str(one) for name, one in (("task", task), ("problem_type", problem)) if one is not None}
    about = {name: value for name, value in said.items() if value is not None}
    # A weighted sum has no head of its own, and the base's is not to be renamed.
    if about and not isinstance(chosen, str):
        option = "--label" if "id2label" in about else f"--{next(iter(about)).replace('_', '-')}"
        message = "it is about the head of one adapter; --adapter NAME=FOLDER loads one, --use NAME chooses it"
        raise typer.BadParameter(message, param_hint=option)
    return about


def _print_empty(answers: list[Classification], texts: Texts | RecordFile, first: int) -> None:
    for index, answer in enumerate(answers, first):
        if is_empty(answer):
            print_message(f"{texts.name(index)}: nothing was found", style="dim")
