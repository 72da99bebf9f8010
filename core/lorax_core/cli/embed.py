"""`lorax embed`: texts to vectors, on stdout.

Decides what is shown of a vector. Knows nothing of models: loading and answering are those of the Python interface, imported
when the command runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

import lorax_core
from lorax_core.cli.options import Truncate, print_truncated, read_texts
from lorax_core.cli.render import SCHEMA, data_only_stdout, show_table
from lorax_core.types import Pooling

if TYPE_CHECKING:
    from lorax_core.types import Embedding

app = typer.Typer(add_completion=False)

_SHOWN = 4  # numbers of a vector in the table


@app.command()
def embed(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint: a folder, or an id on the hub.")],
    texts: Annotated[list[str], typer.Argument(metavar="TEXT", help="What to embed; a single - reads lines of stdin.")],
    truncate: Annotated[
        Truncate, typer.Option(help="A text that is too long: refuse it, or cut its start or its end.")
    ] = Truncate.ERROR,
    pooling: Annotated[
        Pooling | None, typer.Option(help="How rows become one vector, instead of what the checkpoint says.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, a line for each text.")] = False,
) -> None:
    """Embed texts, all in one batch.

    Without --json only the first numbers of each vector are shown.
    """
    chosen: Any = truncate.value  # a Literal there
    requests = [lorax_core.EmbedRequest(input=text, truncate=chosen) for text in read_texts(texts)]
    with data_only_stdout():
        engine = lorax_core.load(path, pooling=pooling)
    with engine:
        embeddings = cast("list[Embedding]", engine.run(requests))
    if json:
        _show_lines(embeddings)
    else:
        show_table(("index", "tokens", "dim", "first values"), [_row(*at) for at in enumerate(embeddings)])
    print_truncated(embeddings)


def _show_lines(embeddings: list[Embedding]) -> None:
    """One JSON object a line, so that a long list can be read while it arrives."""
    from json import dumps

    for index, embedding in enumerate(embeddings):
        line = {
            "schema": SCHEMA,
            "index": index,
            "dim": len(embedding.vector),
            "tokens": embedding.usage.prompt_tokens,
            "truncated": embedding.truncated,
            "vector": embedding.vector.tolist(),
        }
        # Not show_json: that indents, and a line must be one object.
        print(dumps(line))


def _row(index: int, embedding: Embedding) -> list[str]:
    numbers = " ".join(f"{value:+.4f}" for value in embedding.vector[:_SHOWN])
    more = " ..." if len(embedding.vector) > _SHOWN else ""
    return [str(index), str(embedding.usage.prompt_tokens), str(len(embedding.vector)), numbers + more]
