"""`lorax generate`: continue one prompt, the text on stdout as it is made.

Decides how a command line becomes a request, and what is shown of the answer. Knows nothing of models: loading and
answering are those of the Python interface, imported when the command runs.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

import lorax_core
from lorax_core.cli.batches import as_text
from lorax_core.cli.loading import Loading, ModelPath, loads_model
from lorax_core.cli.options import UseAdapter, read_text
from lorax_core.cli.render import print_message, show_json

if TYPE_CHECKING:
    from lorax_core.serving.stream import Stream
    from lorax_core.types import Completion

app = typer.Typer(add_completion=False)


DEFAULT_TOKENS = 128


@app.command()
@loads_model
def generate(
    path: ModelPath,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to continue; - reads it from stdin.")],
    use: UseAdapter = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="The longest answer, in tokens; by default 128, or what the model has room for.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token each time; above, tokens are drawn.")
    ] = 0,
    seed: Annotated[int | None, typer.Option(help="Equal seeds draw equal answers.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be given several times.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, once the answer is complete.")] = False,
    *,
    loading: Loading,
) -> None:
    """Continue a prompt; the text streams to stdout."""
    request = lorax_core.GenerateRequest(
        prompt=read_text(prompt),
        adapter=loading.chosen_adapter(path, use),
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        stop=[as_text(text, "--stop") for text in stop or []],
    )
    with loading.engine(path) as engine:
        if max_tokens is None:  # a default must not refuse what was asked for: it only shortens
            room = engine.info().max_tokens - engine.count_tokens(request.prompt, adapter=request.adapter)
            request = request.model_copy(update={"max_tokens": max(min(DEFAULT_TOKENS, room), 1)})
        started = time.perf_counter()
        completion = _follow(engine.stream(**request.model_dump()), quiet=json)
        seconds = time.perf_counter() - started
    if json:
        _show_json(path, request.adapter, completion)
    else:
        tokens = completion.usage.completion_tokens
        print_message(f"{tokens} tokens in {seconds:.2f} s; ended by: {completion.finish_reason}", style="dim")


def _follow(stream: Stream, quiet: bool) -> Completion:
    """The whole answer; unless `quiet`, each piece is printed as it comes."""
    completion = None
    for event in stream:
        if not quiet:
            # Flushed: in a pipe stdout is buffered, and nothing would stream.
            print(event.text, end="", flush=True)
        # Only the last event has one.
        completion = event.completion
    if not quiet:
        print(flush=True)
    assert completion is not None, "a stream ended without its completion"
    return completion


def _show_json(path: str, adapter: str | dict[str, float] | None, completion: Completion) -> None:
    usage = completion.usage
    show_json(
        {
            "model": path,
            "adapter": adapter,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": str(completion.finish_reason),
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.total_tokens,
            },
        }
    )
