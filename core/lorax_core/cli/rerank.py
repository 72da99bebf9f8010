"""`lorax rerank`: documents by how well they answer a query, on stdout.

Decides what is shown of them. Knows nothing of models: loading and answering are those of the Python interface, imported when
the command runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

import lorax_core
from lorax_core.cli.batches import as_text, print_truncated
from lorax_core.cli.files import Field, InFile
from lorax_core.cli.inputs import given_answers, given_texts
from lorax_core.cli.loading import Loading, ModelPath, loads_model
from lorax_core.cli.options import Truncate, UseAdapter
from lorax_core.cli.records import TextRecord
from lorax_core.cli.render import show_line, show_table

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class _Scored:
    score: float
    record: TextRecord

    @property
    def order(self) -> tuple[float, int]:
        """The best first, and of equal ones the first."""
        return -self.score, self.record.line


@app.command()
@loads_model
def rerank(
    path: ModelPath,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="The query by which documents are ranked.")],
    documents: Annotated[
        list[str] | None,
        typer.Argument(metavar="DOCUMENT", help="Documents to rank; a single - reads lines of stdin."),
    ] = None,
    use: UseAdapter = None,
    top_n: Annotated[int | None, typer.Option(min=1, metavar="N", help="Show only the N best documents.")] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize/--raw", help="Scores from 0 to 1, or the logits themselves.")
    ] = True,
    truncate: Annotated[
        Truncate, typer.Option(help="A pair that is too long: refuse it, or cut its start or its end.")
    ] = Truncate.ERROR,
    file: InFile = None,
    field: Field = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, a line for each document.")] = False,
    *,
    loading: Loading,
) -> None:
    """Rank documents by how well they answer a query, the best first.

    The model is a cross-encoder, a reranker that generates, or a base with an adapter whose head has one label.
    """
    given = given_texts(documents, file, field, name="DOCUMENT")
    asked: dict[str, Any] = {"query": as_text(query, "QUERY"), "adapter": loading.chosen_adapter(path, use)}
    asked |= {"truncate": truncate.value, "normalize": normalize}

    def request(text: str) -> lorax_core.RerankRequest:
        return lorax_core.RerankRequest(document=text, **asked)

    request("")  # what is wrong with the options is known before anything is loaded
    best: list[_Scored] = []
    with loading.engine(path) as engine:
        for records, found in given_answers(engine, given, request):
            print_truncated(found, given, records[0].line - 1)
            best += (_Scored(one.score, record) for one, record in zip(found, records, strict=True))
            if top_n is not None:  # of a long file no more are held
                best = _ordered(best)[:top_n]
    best = _ordered(best)
    if json:
        for rank, one in enumerate(best, 1):
            id = {"id": one.record.id} if one.record.id is not None else {}
            index = one.record.line - 1
            show_line({"rank": rank, "index": index, **id, "score": one.score, "text": one.record.text})
    else:
        show_table(("rank", "score", "index", "text"), [_row(rank, one) for rank, one in enumerate(best, 1)])


def _ordered(scored: list[_Scored]) -> list[_Scored]:
    return sorted(scored, key=lambda one: one.order)


def _row(rank: int, one: _Scored) -> list[str]:
    # One row is one line.
    return [str(rank), f"{one.score:.4f}", str(one.record.line - 1), " ".join(one.record.text.split())]
