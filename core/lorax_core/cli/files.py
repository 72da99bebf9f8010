"""Answers to the records of a file, a window at a time, for commands with `--file` and `--out`.

Decides that one window is computed while the answers before it are written, and how an error names its line. Knows nothing of
what is asked, nor of what is written of an answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

import lorax_core
from lorax_core.cli.loading import Loading
from lorax_core.cli.progress import shown_progress
from lorax_core.cli.records import BEGINNING, Position, RecordFile, TextRecord, Window
from lorax_core.cli.render import print_message
from lorax_core.cli.resuming import FileHead, PartFile, beside, files_mark
from lorax_core.errors import LoraxError, RequestError
from lorax_core.progress import Progress, silent

if TYPE_CHECKING:
    from lorax_core.serving.call import Call
    from lorax_core.serving.engine import Engine
    from lorax_core.serving.requests import Request

_PANEL: Final = "Files"
_APART: Final = ("checkpoint", "revision", "token", "threads", "adapters", "merge_adapter")

InFile = Annotated[
    Path | None,
    typer.Option(
        "--file",
        metavar="FILE",
        help="Texts, one a line, or JSON objects (.jsonl); - is stdin.",
        rich_help_panel=_PANEL,
    ),
]
Field = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="The field of the JSON objects that holds the text, if not text.", rich_help_panel=_PANEL
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the file that --out names.", rich_help_panel=_PANEL)
]
Restart = Annotated[
    bool,
    typer.Option(
        "--restart", help="Start over, and discard what an interrupted run has written.", rich_help_panel=_PANEL
    ),
]


def job_of(loading: Loading, path: str, given: RecordFile, **options: Any) -> dict[str, Any]:
    """What must be the same when an output is continued: model, adapters, options, and how lines are read.

    The input is not in it: a `Position` tells whether what was read of it has changed. A model of the hub is downloaded.
    """
    from lorax_core.adapters.residency.source import masked
    from lorax_core.weights.hub import find_checkpoint

    def mark(source: Any) -> Any:
        if isinstance(source, dict):  # with what is said of the adapter
            said = {name: value for name, value in source.items() if name != "token"}
            return {**said, "source": mark(source["source"])}
        folder = Path(source).expanduser()
        return files_mark(folder) if folder.is_dir() else masked(source)

    loaded = loading.options_of(path)
    found = find_checkpoint(loaded["checkpoint"], revision=loaded.get("revision"), token=loaded.get("token"))
    merged = loaded.get("merge_adapter")
    # What changes no number is left out, and a token is a secret.
    rest = {name: value for name, value in loaded.items() if name not in _APART}
    return {
        "version of lorax": lorax_core.__version__,
        "model": files_mark(found),
        "set of adapters": {name: mark(source) for name, source in loaded["adapters"].items()},
        "merged adapter": mark(merged) if merged is not None else None,
        "form of --file": given.json_field or "text" if given.is_json else None,
        **{f"--{name.replace('_', '-')}": value for name, value in {**rest, **options}.items()},
    }


def refuse_same(given: RecordFile, out: Path) -> None:
    """Raises RequestError when the output, or what is written beside it meanwhile, would replace the input."""
    for file in (out, *beside(out)):
        if given.is_file(file):
            writes = "" if file == out else f", and --out {out} writes it meanwhile"
            raise RequestError(f"{file} is the file that is read{writes}", hint="give the output a name of its own")


def file_answers(
    engine: Engine, given: RecordFile, request: Callable[[TextRecord], Request], start: Position = BEGINNING
) -> Iterator[tuple[Window, list[Any]]]:
    """The answers to the records behind a position, in order.

    A window is one call, so that its steps, and all bits of its answers, are the same wherever a reading began. It is
    computed while the caller writes the one before. An error comes after the answers before it, in a window without an end.
    """
    done: tuple[Window, list[Any]] | None = None
    for window in given.windows(start):
        asked = _ask(engine, given, window, request)
        # The caller has it written while the next one is computed, and not before: steps would hold records of both.
        if done is not None:
            yield done
        answers, error = asked.outcome()
        if error is not None:
            if answers:
                yield Window(window.records[: len(answers)], None), answers
            raise error
        done = window, answers
    if done is not None:
        yield done


def write_answers(
    engine: Engine,
    given: RecordFile,
    request: Callable[[TextRecord], Request],
    part: PartFile,
    head: FileHead,
    encode: Callable[[list[TextRecord], list[Any]], bytes],
) -> None:
    """Answers to all records that are not answered yet, into a file as it is `encode`d; says how many on stderr."""
    start, began = part.position, time.monotonic()
    if start.records:
        print_message(f"{part.out} is continued at line {start.records + 1:,} of {given.title}")
    try:
        with part.writing(head), shown_progress() as report:
            # Counting reads the file once more, for nothing where nobody looks.
            total = None if report is silent else given.count()
            stage = f"writing {part.out.name}"
            report(Progress(stage, start.records, total, "lines"))
            for window, answers in file_answers(engine, given, request, start):
                # What precedes an error in its window would be computed in other steps than without it.
                if window.end is not None:
                    part.add(encode(window.records, answers), window.end)
                    report(Progress(stage, part.position.records, total, "lines"))
    except BaseException:
        if part.kept:
            how = "the same command line without --restart" if part.restart else "the same command line"
            print_message(f"{part.kept:,} lines are done; {how} goes on from there")
        raise
    done, seconds = part.position.records - start.records, time.monotonic() - began
    print_message(f"{done:,} lines in {seconds:.1f} s, {done / max(seconds, 1e-9):,.1f} a second: {part.out}")


@dataclass(frozen=True, slots=True)
class _Awaited:
    """A call for the records of a window, and what is wrong with the one behind the last that it asks for."""

    given: RecordFile
    records: list[TextRecord]
    call: Call
    error: LoraxError | None

    def outcome(self) -> tuple[list[Any], LoraxError | None]:
        """The answers, until the first that failed; and its error."""
        try:
            return self.call.wait(), self.error
        except LoraxError:
            for index, one in enumerate(self.call.results):
                if isinstance(one, LoraxError):
                    return self.call.results[:index], _located(self.given, self.records[index], one)
            raise


def _ask(engine: Engine, given: RecordFile, window: Window, request: Callable[[TextRecord], Request]) -> _Awaited:
    requests: list[Request] = []
    error: LoraxError | None = window.error
    for record in window.records:
        try:
            requests.append(request(record))
        except LoraxError as refused:
            error = _located(given, record, refused)
            break
    try:
        return _Awaited(given, window.records, engine.submit(requests), error)
    except LoraxError:
        for index, one in enumerate(requests):
            try:
                engine.submit([one]).cancel()
            except LoraxError as refused:
                error = _located(given, window.records[index], refused)
                return _Awaited(given, window.records, engine.submit(requests[:index]), error)
        raise  # it was none of them


def _located(given: RecordFile, record: TextRecord, error: LoraxError) -> LoraxError:
    found = LoraxError(f"{given.name(record.line - 1)}: {error.message}", hint=error.hint)
    found.__cause__ = error
    return found
