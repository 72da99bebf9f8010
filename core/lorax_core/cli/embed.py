"""`lorax embed`: texts to vectors, on stdout or in a file.

Decides what is shown of a vector. Knows nothing of models: loading and answering are those of the Python interface, imported
when the command runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

import lorax_core
from lorax_core.cli.batches import Texts, answers, as_text, print_truncated
from lorax_core.cli.files import Field, InFile, Overwrite, Restart, file_answers, job_of, refuse_same, write_answers
from lorax_core.cli.loading import Loading, ModelPath, loads_model
from lorax_core.cli.options import Truncate, UseAdapter
from lorax_core.cli.records import Bounds, RecordFile, TextRecord
from lorax_core.cli.render import Table, json_line, print_message, show_json, show_line, show_table
from lorax_core.cli.resuming import FileHead, NoHead, PartFile
from lorax_core.cli.vectors import NpyHead, SafetensorsHead, rows
from lorax_core.errors import RequestError, listed
from lorax_core.types import Embedding

if TYPE_CHECKING:
    from lorax_core.serving.engine import Engine

app = typer.Typer(add_completion=False)

_SHOWN: Final = 4  # numbers of a vector in the table
_CUT: Final = 3  # of the lines that were cut, those that are named
_COLUMNS: Final = ("index", "tokens", "dim", "first values")
_FEW: Final = 32
"""Texts of a matrix of similarities, which people look at."""
_HEADS: Final[Mapping[str, Callable[[int], FileHead]]] = {".npy": NpyHead, ".safetensors": SafetensorsHead}
_LINES: Final = ".jsonl"
_ROWS: Final = Bounds(records=64, bytes=64 * 2**10)
"""Of a window whose answers have a vector for each token: some 64 MiB of a thousand numbers each."""


class PoolingChoice(StrEnum):
    """The values of `EmbedRequest.pooling`."""

    CLS = "cls"
    MEAN = "mean"
    LAST = "last"
    NONE = "none"


_OutFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write .npy, .safetensors or .jsonl. The same command line again continues what was interrupted.",
        rich_help_panel="Files",
    ),
]


@app.command()
@loads_model
def embed(
    path: ModelPath,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Texts to embed; a single - reads lines of stdin.")
    ] = None,
    use: UseAdapter = None,
    truncate: Annotated[
        Truncate, typer.Option(help="A text that is too long: refuse it, or cut its start or its end.")
    ] = Truncate.ERROR,
    pooling: Annotated[
        PoolingChoice | None,
        typer.Option(help="How rows become one vector, instead of what the checkpoint says; none gives all rows."),
    ] = None,
    normalize: Annotated[
        bool | None, typer.Option("--normalize/--no-normalize", help="Vectors of unit length, or as they are.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What to put before each text.")] = None,
    prompt_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The prompt of the checkpoint to put before each text.")
    ] = None,
    dimensions: Annotated[
        int | None, typer.Option(metavar="N", help="Keep the first N numbers of each vector.")
    ] = None,
    similarity: Annotated[
        bool, typer.Option("--similarity", help="Show the cosine similarity of each pair of texts instead.")
    ] = False,
    file: InFile = None,
    field: Field = None,
    out: _OutFile = None,
    overwrite: Overwrite = False,
    restart: Restart = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, a line for each text.")] = False,
    *,
    loading: Loading,
) -> None:
    """Embed texts; a line of stdin or of a file is a text, an empty one too.

    Without --json only the first numbers of each vector are shown.
    """
    by_token = pooling is PoolingChoice.NONE
    _check_command(texts, file, field, out, similarity=similarity, by_token=by_token, json=json)
    if out is None and (overwrite or restart):
        raise typer.BadParameter(
            "it is about the file that --out names", param_hint="--restart" if restart else "--overwrite"
        )
    options: dict[str, Any] = {"truncate": truncate.value, "pooling": "none" if by_token else None}
    options |= {"normalize": normalize, "dimensions": dimensions, "prompt_name": prompt_name}
    options |= {"prompt": as_text(prompt, "--prompt") if prompt is not None else None}
    options |= {"adapter": loading.chosen_adapter(path, use)}
    asked = _EmbedJob(loading, path, options, pooling.value if pooling is not None and not by_token else None)
    asked.request("")  # what is wrong with the options is known before anything is loaded
    if file is None:
        _show_texts(asked, Texts(texts or []), json=json, matrix=similarity)
        return
    given = RecordFile(file, field, _ROWS if by_token else Bounds())
    given.check()
    if out is None:
        _show_file(asked, given, json=json)
    else:
        _write_file(asked, given, out, overwrite=overwrite, restart=restart)


@dataclass(frozen=True, slots=True)
class _EmbedJob:
    """A model, and what is asked of it. `pooling` is an option of the model: its files may name one that is not supported."""

    loading: Loading
    path: str
    options: dict[str, Any]
    pooling: str | None

    def engine(self) -> AbstractContextManager[Engine]:
        """The engine of the model."""
        return self.loading.engine(self.path, pooling=self.pooling)

    def request(self, text: str) -> lorax_core.EmbedRequest:
        """What is asked of a text."""
        return lorax_core.EmbedRequest(input=text, **self.options)

    def of_record(self, record: TextRecord) -> lorax_core.EmbedRequest:
        """What is asked of a line."""
        return self.request(record.text)


def _check_command(
    texts: list[str] | None,
    file: Path | None,
    field: str | None,
    out: Path | None,
    *,
    similarity: bool,
    by_token: bool,
    json: bool,
) -> None:
    """Raises BadParameter for options that say nothing together."""
    wrong: tuple[str, str] | None = None
    if bool(texts) == (file is not None):
        wrong = "TEXT", "give texts, a single - for lines of stdin, or --file FILE, and one of them alone"
    elif file is None and (out is not None or field is not None):
        wrong = "--out" if out is not None else "--field", "it needs --file FILE; --file - reads lines of stdin"
    elif out is not None and out.suffix not in (*_HEADS, _LINES):
        wrong = "--out", f"{out.name!r} ends in none of {listed((*_HEADS, _LINES))}"
    elif out is not None and json:
        wrong = "--json", f"it is about stdout; --out {out.stem}{_LINES} writes JSON"
    elif similarity and (file is not None or by_token):
        wrong = "--similarity", "it compares the vectors of texts that are given one by one, or as lines of stdin"
    elif by_token and not (json if out is None else out.suffix == _LINES):
        wrong = (
            "--pooling",
            f"the rows of texts are of different number: --json shows them, --out FILE{_LINES} writes them",
        )
    if wrong is not None:
        raise typer.BadParameter(wrong[1], param_hint=wrong[0])


def _show_texts(asked: _EmbedJob, given: Texts, *, json: bool, matrix: bool) -> None:
    table = Table(_COLUMNS)
    with asked.engine() as engine:
        found = answers(engine, given, asked.request)
        if matrix:
            _show_matrix(found, json=json)
            return
        for first, some in found:
            _show(some, first, [], None if json else table)
            print_truncated(some, given, first)


def _show_file(asked: _EmbedJob, given: RecordFile, *, json: bool) -> None:
    table = Table(_COLUMNS)
    with asked.engine() as engine:
        for window, some in file_answers(engine, given, asked.of_record):
            first = window.records[0].line - 1
            _show(some, first, window.records, None if json else table)
            print_truncated(some, given, first)


def _write_file(asked: _EmbedJob, given: RecordFile, out: Path, *, overwrite: bool, restart: bool) -> None:
    refuse_same(given, out)
    options = {name: value for name, value in asked.options.items() if name not in ("adapter", "pooling")}
    options |= {"use": asked.options["adapter"], "pooling": asked.pooling or asked.options["pooling"]}
    job = job_of(asked.loading, asked.path, given, **options)
    part = PartFile(out, {**job, "form of --out": out.suffix}, overwrite=overwrite, restart=restart)
    cut: list[str] = []  # no more than are shown
    cut_count = 0

    def encode(records: list[TextRecord], found: list[Embedding]) -> bytes:
        nonlocal cut_count
        lines = [record.line for record, answer in zip(records, found, strict=True) if answer.truncated]
        cut_count += len(lines)
        cut.extend(map(str, lines[: _CUT - len(cut)]))
        if out.suffix != _LINES:
            return rows(answer.vector for answer in found)
        texts = (json_line(_about(one, record.line - 1, record.id)) for one, record in zip(found, records, strict=True))
        return "".join(f"{text}\n" for text in texts).encode()

    with asked.engine() as engine:
        head = _HEADS.get(out.suffix)
        dim = engine.embed([], dimensions=asked.options["dimensions"]).shape[1]
        write_answers(engine, given, asked.of_record, part, head(dim) if head is not None else NoHead(), encode)
    if cut:
        more = f" and {cut_count - len(cut):,} more" if cut_count > len(cut) else ""
        message = f"too long and cut: line {', '.join(cut)}{more} of {given.title}"
        print_message(message, label="warning", style="yellow")


def _show(found: list[Embedding], first: int, records: list[TextRecord], table: Table | None) -> None:
    """Vectors as JSON, or in a table where there is one."""
    if table is None:
        ids = [one.id for one in records] or [None] * len(found)
        for index, (embedding, id) in enumerate(zip(found, ids, strict=True), first):
            show_line(_about(embedding, index, id))
    else:
        table.add(_row(*at) for at in enumerate(found, first))
    # The reader of a pipe has these while the next are computed.
    sys.stdout.flush()


def _about(embedding: Embedding, index: int, id: Any) -> dict[str, Any]:
    return {
        "index": index,
        **({"id": id} if id is not None else {}),
        "dim": embedding.vector.shape[-1],
        "tokens": embedding.usage.prompt_tokens,
        "truncated": embedding.truncated,
        "vector": embedding.vector.tolist(),
    }


def _row(index: int, embedding: Embedding) -> list[str]:
    numbers = " ".join(f"{value:+.4f}" for value in embedding.vector[:_SHOWN])
    more = " ..." if len(embedding.vector) > _SHOWN else ""
    return [str(index), str(embedding.usage.prompt_tokens), str(len(embedding.vector)), numbers + more]


def _show_matrix(found: Iterator[tuple[int, list[Embedding]]], *, json: bool) -> None:
    """The cosine of each two."""
    import numpy as np

    vectors: list[Any] = []
    for _, some in found:
        vectors += [one.vector for one in some]
        if len(vectors) > _FEW:
            raise RequestError(
                f"--similarity shows at most {_FEW} texts, and these are more",
                hint="write the vectors of many: --file texts.txt --out vectors.npy",
            )
    # float64, so that of a text with itself it is 1.
    stacked = np.stack(vectors).astype(np.float64) if vectors else np.zeros((0, 1))
    unit = stacked / np.maximum(np.linalg.norm(stacked, axis=1, keepdims=True), 1e-12)
    matrix = unit @ unit.T
    if json:
        show_json({"similarity": [[round(float(one), 6) for one in line] for line in matrix]})
        return
    rows = [[str(index), *(f"{value:.3f}" for value in line)] for index, line in enumerate(matrix)]
    show_table(("", *map(str, range(len(matrix)))), rows)
