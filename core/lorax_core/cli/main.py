"""The entry of the `lorax` command: which subcommands there are, and how an error ends the process.

Decides exit codes, `EXIT_CODES`. Knows nothing of what a subcommand does; each is a module of this package with a typer
`app`, imported when it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

import lorax_core
from lorax_core.cli.config import find_config, flag_defaults, read_config
from lorax_core.cli.streams import OutputError, standard_streams
from lorax_core.errors import LoraxError

EXIT_CODES: Final = {
    0: "done, and all output is written",
    1: "an error, printed on stderr; or a check that found a problem",
    2: "a wrong command line",
    130: "interrupted by Ctrl-C",
    141: "the reader of the output closed it, as `head` does",
}
"""What `lorax --help` and docs/cli.md say of exit codes."""

SUBCOMMANDS: Final = (
    *("models", "plugins", "adapters"),
    *("generate", "chat", "embed", "classify", "rerank", "serve", "bench", "doctor"),
)


class Subcommands(TyperGroup):
    """The subcommands by name; only the one that runs, or all for the help page, are imported."""

    def __init__(self, **attributes: Any) -> None:
        """Names the subcommands, for the help page and for typer's suggestions; None stands for what comes later."""
        super().__init__(**attributes)
        self.commands = dict.fromkeys(SUBCOMMANDS)  # type: ignore[assignment]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or None."""
        if cmd_name not in SUBCOMMANDS:
            return None
        # Late: each subcommand has its imports, and `lorax --version` needs none of them.
        command = typer.main.get_command(importlib.import_module(f"lorax_core.cli.{cmd_name}").app)
        command.name = cmd_name
        return command

    def invoke(self, ctx: Any) -> Any:
        """Runs the subcommand; a `LoraxError` becomes a message and exit code 1."""
        try:
            return super().invoke(ctx)
        except OutputError:  # help pages may fail like this too, so `main` reports it
            raise
        except LoraxError as error:
            # Before the message, which then stands last, next to the prompt.
            if ctx.params.get("debug"):
                import traceback

                traceback.print_exception(error)
            from lorax_core.cli.hints import at_command_line
            from lorax_core.cli.render import print_error

            print_error(at_command_line(error, f"lorax {ctx.invoked_subcommand}"))
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=Subcommands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="\n\n".join(["Exit codes:", *(f"{code}: {meaning}." for code, meaning in EXIT_CODES.items())]),
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lorax {lorax_core.__version__}")
        raise typer.Exit


@app.callback()
def lorax(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 - its callback reads it
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[  # noqa: ARG001 - `Subcommands.invoke` reads it
        bool, typer.Option("--debug", "--verbose", help="Show the traceback of an error.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Models and options by name; by default lorax.toml in this folder."),
    ] = None,
) -> None:
    """One runtime for a zoo of pip-installed architectures."""
    name = context.invoked_subcommand
    file = find_config(config)
    context.obj = read_config(file, SUBCOMMANDS)
    if file is not None and name is not None and isinstance(context.command, Subcommands):
        command = context.command.get_command(context, name)
        context.default_map = {name: flag_defaults(context.obj, command, name)}
        if config is None:  # it was found, not named
            from lorax_core.cli.render import print_message

            print_message(f"options from {file}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line `arguments`, `sys.argv` by default. Ends in `SystemExit`, with a code of `EXIT_CODES`."""
    try:
        with standard_streams():
            app(args=arguments, prog_name="lorax")
    except OutputError as error:
        if error.unwanted:
            raise SystemExit(141) from error
        from lorax_core.cli.render import print_error

        print_error(error)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
