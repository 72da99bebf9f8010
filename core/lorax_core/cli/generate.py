"""`lorax generate`: continue a prompt, the text on stdout as it is made, or the prompts of a file.

Decides how a command line becomes a request. Knows nothing of models: loading and
answering are those of the Python interface, imported when the command runs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import lorax_core
from lorax_core.cli.batches import as_text
from lorax_core.cli.completions import answers_json, blocks, follow, show_text, summary
from lorax_core.cli.files import Field, InFile, Overwrite, Restart
from lorax_core.cli.inputs import check_out, given_file
from lorax_core.cli.loading import Loading, ModelOrServer, loads_model
from lorax_core.cli.options import UseAdapter, read_text
from lorax_core.cli.prompt_file import DEFAULT_TOKENS, LINES, WINDOW, PromptFile, with_room
from lorax_core.cli.render import print_message, show_json
from lorax_core.cli.sampling import samples
from lorax_core.cli.served import completions_of

if TYPE_CHECKING:
    from lorax_core.cli.served import ServedEvent, Server

app = typer.Typer(add_completion=False)

_OutFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write .jsonl or .txt. The same command line again continues what was interrupted.",
        rich_help_panel="Files",
    ),
]


@app.command()
@loads_model
@samples
def generate(
    path: ModelOrServer,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from stdin.")
    ] = None,
    use: UseAdapter = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message, which the chat template of the model renders.")
    ] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message before it, with --chat.")] = None,
    n: Annotated[int | None, typer.Option("--n", metavar="N", help="Number of answers, drawn independently.")] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --json, each token's log-probability and the N most likely tokens."),
    ] = None,
    file: InFile = None,
    field: Field = None,
    out: _OutFile = None,
    overwrite: Overwrite = False,
    restart: Restart = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, once an answer is complete.")] = False,
    *,
    sampling: dict[str, Any],
    loading: Loading,
) -> None:
    """Continue a prompt, whose answer streams to stdout, or each line of a file.

    An answer has at most 128 tokens unless --max-tokens says otherwise. A MODEL such as http://localhost:8000 is a server
    with OpenAI's API, which answers; its key is the first of LORAX_API_KEYS.
    """
    if logprobs is not None and not (json if out is None else out.suffix == LINES):
        raise typer.BadParameter("only JSON has room for them: add --json", param_hint="--logprobs")
    server = loading.server(path)
    if server is not None:
        _check_served(file=file, logprobs=logprobs)
    adapter = loading.chosen_adapter(path, use) if server is None else server.chosen(use)
    options = {**sampling, "adapter": adapter}
    options |= {name: value for name, value in (("n", n), ("logprobs", logprobs)) if value is not None}
    ask = _asking(options, chat=chat, system=system)
    given = given_file(file, field, WINDOW)
    check_out(out, (LINES, ".txt"), given, json=json, overwrite=overwrite, restart=restart)
    if (prompt is None) == (given is None):
        raise typer.BadParameter(
            "give a prompt, - for stdin, or --file FILE, and one of them alone", param_hint="PROMPT"
        )
    if given is None:
        request = ask(read_text(prompt or ""))
        if server is None:
            _continue_one(loading, path, request, json=json)
        else:
            _ask_server(server, request, json=json)
        return
    ask("")  # what is wrong with the options is known before anything is loaded
    job = PromptFile(loading, path, given, ask)
    if out is None:
        job.show(json=json)
    else:
        about = {**options, "use": options["adapter"], "chat": chat, "system": system}
        job.write(out, about, overwrite=overwrite, restart=restart)


def _continue_one(loading: Loading, path: str, request: lorax_core.GenerateRequest, *, json: bool) -> None:
    with loading.engine(path) as engine:
        request = with_room(engine, request)
        started = time.perf_counter()
        found = follow(engine.stream(**request.model_dump()), quiet=json or request.n > 1)
        seconds = time.perf_counter() - started
        if json:
            show_json({"model": path, "adapter": request.adapter, **answers_json(engine, found)})
            return
    if request.n > 1:
        show_text("\n".join([*blocks(found), ""]))
    print_message(summary(found, seconds), style="dim")


def _check_served(**given: object) -> None:
    """What `lorax generate` does not ask of servers."""
    for name, value in given.items():
        if value is not None:
            raise typer.BadParameter("this needs a model that is loaded here, not a server", param_hint=f"--{name}")


def _ask_server(server: Server, request: lorax_core.GenerateRequest, *, json: bool) -> None:
    """As `_continue_one`, by a running server."""
    if request.max_tokens is None:
        request = request.model_copy(update={"max_tokens": max(DEFAULT_TOKENS, request.min_tokens)})
    quiet = json or request.n > 1
    started = time.perf_counter()
    with contextlib.closing(server.stream(request)) as stream:
        found = completions_of(stream if quiet else _shown(stream))
    seconds = time.perf_counter() - started
    if json:
        answers = [{"text": one.text, "finish_reason": str(one.finish_reason)} for one in found]
        usage = {"prompt_tokens": found[0].usage.prompt_tokens, "completion_tokens": found[0].usage.completion_tokens}
        others = {"alternatives": answers[1:]} if answers[1:] else {}
        about = {"url": server.url, "model": server.base, "adapter": request.adapter}
        show_json({**about, **answers[0], "usage": usage, **others})
        return
    show_text("\n".join([*blocks(found), ""]) if quiet else "\n")
    print_message(summary(found, seconds), style="dim")


def _shown(stream: Iterator[ServedEvent]) -> Iterator[ServedEvent]:
    """Pieces that are printed as they come."""
    for piece in stream:
        show_text(piece.text)
        yield piece


def _asking(options: dict[str, Any], *, chat: bool, system: str | None) -> Callable[[str], lorax_core.GenerateRequest]:
    """How a prompt becomes a request."""
    if system is not None and not chat:
        raise typer.BadParameter("it is a message of a conversation: add --chat", param_hint="--system")
    before = [{"role": "system", "content": as_text(system, "--system")}] if system is not None else []

    def ask(text: str) -> lorax_core.GenerateRequest:
        prompt: Any = [*before, {"role": "user", "content": text}] if chat else text
        return lorax_core.GenerateRequest(prompt=prompt, **options)

    return ask
