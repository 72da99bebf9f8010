"""`lorax generate`: continue a prompt, the text on stdout as it is made, or the prompts of a file.

Decides how a command line becomes a request. Knows nothing of models: loading and
answering are those of the Python interface, imported when the command runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import lorax_core
from lorax_core.cli.batches import as_text
from lorax_core.cli.completions import answers_json, blocks, follow, show_text, summary
from lorax_core.cli.files import Field, InFile, Overwrite, Restart
from lorax_core.cli.inputs import check_out, given_file
from lorax_core.cli.loading import Loading, ModelPath, loads_model
from lorax_core.cli.options import UseAdapter, read_text
from lorax_core.cli.prompt_file import LINES, WINDOW, PromptFile, with_room
from lorax_core.cli.render import print_message, show_json
from lorax_core.cli.sampling import samples

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
    path: ModelPath,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What to continue; - reads it from stdin.")
    ] = None,
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

    An answer has at most 128 tokens unless --max-tokens says otherwise.
    """
    if logprobs is not None and not (json if out is None else out.suffix == LINES):
        raise typer.BadParameter("only JSON has room for them: add --json", param_hint="--logprobs")
    options = {**sampling, "adapter": loading.chosen_adapter(path, use)}
    options |= {name: value for name, value in (("n", n), ("logprobs", logprobs)) if value is not None}
    ask = _asking(options, chat=chat, system=system)
    given = given_file(file, field, WINDOW)
    check_out(out, (LINES, ".txt"), given, json=json, overwrite=overwrite, restart=restart)
    if (prompt is None) == (given is None):
        raise typer.BadParameter(
            "give a prompt, - for stdin, or --file FILE, and one of them alone", param_hint="PROMPT"
        )
    if given is None:
        _continue_one(loading, path, ask(read_text(prompt or "")), json=json)
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


def _asking(options: dict[str, Any], *, chat: bool, system: str | None) -> Callable[[str], lorax_core.GenerateRequest]:
    """How a prompt becomes a request."""
    if system is not None and not chat:
        raise typer.BadParameter("it is a message of a conversation: add --chat", param_hint="--system")
    before = [{"role": "system", "content": as_text(system, "--system")}] if system is not None else []

    def ask(text: str) -> lorax_core.GenerateRequest:
        prompt: Any = [*before, {"role": "user", "content": text}] if chat else text
        return lorax_core.GenerateRequest(prompt=prompt, **options)

    return ask
