"""`lorax embed`: texts to vectors, on stdout.

Decides what is shown of a vector. Knows nothing of models: loading and answering are those of the Python interface, imported
when the command runs.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

import lorax_core
from lorax_core.cli.batches import Texts, answers, print_truncated
from lorax_core.cli.loading import Loading, ModelPath, loads_model
from lorax_core.cli.options import Truncate, UseAdapter
from lorax_core.cli.render import Table, show_line
from lorax_core.types import Embedding, Pooling

app = typer.Typer(add_completion=False)

_SHOWN = 4  # numbers of a vector in the table


@app.command()
@loads_model
def embed(
    path: ModelPath,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT", help="What to embed; a single - reads lines of stdin.")],
    use: UseAdapter = None,
    truncate: Annotated[
        Truncate, typer.Option(help="A text that is too long: refuse it, or cut its start or its end.")
    ] = Truncate.ERROR,
    pooling: Annotated[
        Pooling | None, typer.Option(help="How rows become one vector, instead of what the checkpoint says.")
    ] = None,
    prompt_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The prompt of the checkpoint to put before each text.")
    ] = None,
    dimensions: Annotated[int | None, typer.Option(help="Keep the first so many numbers of each vector.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, a line for each text.")] = False,
    *,
    loading: Loading,
) -> None:
    """Embed texts; a line of stdin is a text, an empty one too.

    Without --json only the first numbers of each vector are shown.
    """
    cut: Any = truncate.value  # a Literal there
    given = Texts(texts)
    adapter = loading.chosen_adapter(path, use)

    def request(text: str) -> lorax_core.EmbedRequest:
        return lorax_core.EmbedRequest(
            input=text, adapter=adapter, truncate=cut, prompt_name=prompt_name, dimensions=dimensions
        )

    table = Table(("index", "tokens", "dim", "first values"))
    with loading.engine(path, pooling=pooling) as engine:
        for first, found in answers(engine, given, request):
            if json:
                _show_lines(found, first)
            else:
                table.add(_row(*at) for at in enumerate(found, first))
            # Whoever reads a pipe has these while the next are computed.
            sys.stdout.flush()
            print_truncated(found, given, first)


def _show_lines(embeddings: list[Embedding], first: int) -> None:
    for index, embedding in enumerate(embeddings, first):
        show_line(
            {
                "index": index,
                "dim": len(embedding.vector),
                "tokens": embedding.usage.prompt_tokens,
                "truncated": embedding.truncated,
                "vector": embedding.vector.tolist(),
            }
        )


def _row(index: int, embedding: Embedding) -> list[str]:
    numbers = " ".join(f"{value:+.4f}" for value in embedding.vector[:_SHOWN])
    more = " ..." if len(embedding.vector) > _SHOWN else ""
    return [str(index), str(embedding.usage.prompt_tokens), str(len(embedding.vector)), numbers + more]
