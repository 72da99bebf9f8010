"""`lorax generate`: continue a prompt, the text on stdout as it is made.

Decides how a command line becomes a request, and how long an answer is by default. Knows nothing of models: loading and
answering are those of the Python interface, imported when the command runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

import lorax_core
from lorax_core.cli.batches import as_text
from lorax_core.cli.completions import answers_json, blocks, follow, summary
from lorax_core.cli.loading import Loading, ModelPath, loads_model
from lorax_core.cli.options import UseAdapter, read_text
from lorax_core.cli.render import print_message, show_json
from lorax_core.cli.sampling import samples

if TYPE_CHECKING:
    from lorax_core.serving.engine import Engine

app = typer.Typer(add_completion=False)

DEFAULT_TOKENS: Final = 128
"""Of an answer, unless --max-tokens says otherwise, or the model has room for less."""


@app.command()
@loads_model
@samples
def generate(
    path: ModelPath,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to continue; - reads it from stdin.")],
    use: UseAdapter = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message, which the chat template of the model renders.")
    ] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message before it, with --chat.")] = None,
    n: Annotated[int | None, typer.Option("--n", metavar="N", help="So many answers, drawn independently.")] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --json, each token's log-probability and so many of the likeliest."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, once the answer is complete.")] = False,
    *,
    sampling: dict[str, Any],
    loading: Loading,
) -> None:
    """Continue a prompt; the text streams to stdout.

    An answer has at most 128 tokens unless --max-tokens says otherwise.
    """
    if logprobs is not None and not json:
        raise typer.BadParameter("only JSON has room for them: add --json", param_hint="--logprobs")
    options = {**sampling, "adapter": loading.chosen_adapter(path, use)}
    options |= {name: value for name, value in (("n", n), ("logprobs", logprobs)) if value is not None}
    ask = _asking(options, chat=chat, system=system)
    request = ask(read_text(prompt))
    with loading.engine(path) as engine:
        request = with_room(engine, request)
        started = time.perf_counter()
        found = follow(engine.stream(**request.model_dump()), quiet=json or request.n > 1)
        seconds = time.perf_counter() - started
        if json:
            show_json({"model": path, "adapter": request.adapter, **answers_json(engine, found)})
            return
    if request.n > 1:
        print("\n".join(blocks(found)))
    print_message(summary(found, seconds), style="dim")


def _asking(options: dict[str, Any], *, chat: bool, system: str | None) -> Callable[[str], lorax_core.GenerateRequest]:
    """How a prompt becomes a request."""
    if system is not None and not chat:
        raise typer.BadParameter("it is a message of a conversation: add --chat", param_hint="--system")
    before = [{"role": "system", "content": as_text(system, "--system")}] if system is not None else []

    def ask(text: str) -> lorax_core.GenerateRequest:
        prompt: Any = [*before, {"role": "user", "content": text}] if chat else text
        return lorax_core.GenerateRequest(prompt=prompt, **options)

    return ask


def with_room(engine: Engine, request: lorax_core.GenerateRequest) -> lorax_core.GenerateRequest:
    """A request whose answer ends by itself, or after `DEFAULT_TOKENS`."""
    if request.max_tokens is not None:
        return request
    # A default must not refuse what was asked for: it only shortens.
    room = engine.info().max_tokens - engine.count_tokens(request.prompt, adapter=request.adapter)
    most = max(min(max(DEFAULT_TOKENS, request.min_tokens), room), 1)
    return lorax_core.GenerateRequest(**{**request.model_dump(), "max_tokens": most})
