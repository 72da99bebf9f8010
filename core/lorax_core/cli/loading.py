"""What all commands that load a model have in common: the flags of loading, and the way from MODEL to an engine.

Decides which of the engine's options every command has, and that a flag comes before what `lorax.toml` says of a model. Knows
nothing of models: loading is that of the Python interface, imported when an engine is asked for.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

import lorax_core
from lorax_core.cli.config import Config, find_config, read_config
from lorax_core.cli.flags import with_flags
from lorax_core.cli.options import chosen_adapter, named_sources
from lorax_core.cli.progress import shown_progress
from lorax_core.cli.render import data_only_stdout
from lorax_core.cli.served import Server, is_address, looks_like_address
from lorax_core.errors import CheckpointError, LoraxError, RequestError, listed, nearest

if TYPE_CHECKING:
    from lorax_core.serving.engine import Engine

LOADING_PANEL: Final = "Loading"
"""Where the help lists the flags of loading."""


def _named_models(context: typer.Context, incomplete: str) -> list[str]:
    """Models of lorax.toml whose names begin so, for the shell, which finds folders itself."""
    root = context.find_root()
    with contextlib.suppress(LoraxError):  # the command says it when it runs
        config = read_config(find_config(root.params.get("config")), getattr(root.command, "commands", ()))
        return [name for name in config.models if name.startswith(incomplete)]
    return []


ModelPath = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A checkpoint: a folder, an id on the hub, or a model of lorax.toml.",
        autocompletion=_named_models,
    ),
]


def _flag(kind: Any, *names: str, help: str, metavar: str | None = None) -> Any:
    return Annotated[kind | None, typer.Option(*names, metavar=metavar, help=help, rich_help_panel=LOADING_PANEL)]


# By the names of `EngineOptions`, but for adapters, which are given one by one. A flag that was left out leaves the option to
# lorax.toml, and else to the defaults of the Python interface.
_FLAGS: Final[Mapping[str, Any]] = {
    "adapter": _flag(list[str], metavar="NAME=SOURCE", help="Load an adapter: a folder, hub id or URL. Repeatable."),
    "merge_adapter": _flag(str, metavar="SOURCE", help="Merge an adapter into the weights while they are loaded."),
    "revision": _flag(str, metavar="REV", help="Branch, tag or commit of a hub id."),
    "token": _flag(
        str, help="Access token of the hub. HF_TOKEN says the same, and stays out of the list of processes."
    ),
    "dtype": _flag(str, help="auto, float32, bfloat16 or float16."),
    "device": _flag(str, help="auto, cpu or cuda."),
    "quantize": _flag(str, metavar="int8|int4", help="Quantize the weights of linear layers when they are loaded."),
    "threads": _flag(int, metavar="N", help="Number of CPU threads."),
}


ModelOrServer = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A checkpoint: a folder, an id on the hub, or a model of lorax.toml; or the address of a running server.",
        autocompletion=_named_models,
    ),
]


@dataclass(frozen=True, slots=True)
class Loading:
    """What a command line says of loading. `options` are those of `lorax_core.load`, without what was left out."""

    options: Mapping[str, Any] = field(default_factory=dict)
    config: Config = field(default_factory=Config)
    typed: frozenset[str] = frozenset()
    """The options that come from the command line itself, and not from a table of lorax.toml for the subcommand."""

    def options_of(self, path: str) -> dict[str, Any]:
        """All that `lorax_core.load` takes: what lorax.toml says of a model of that name, and above it the flags."""
        named = dict(self.config.models.get(path, {}))
        adapters = {**named.pop("adapters", {}), **self.options.get("adapters", {})}
        return {"checkpoint": named.pop("path", path), **named, **self.options, "adapters": adapters}

    def server(self, path: str) -> Server | None:
        """The running server that MODEL is the address of; None for a checkpoint. Raises RequestError where none answers."""
        if path in self.config.models:
            self._check_names(path)
        options = self.options_of(path)
        url = options.pop("checkpoint")
        if not is_address(url):
            return None
        # What a subcommand loads with in general is not meant for a server.
        of_model = self.config.models.get(path, {})
        if said := [name for name, value in options.items() if value and (name in self.typed or name in of_model)]:
            raise RequestError(
                f"{listed(said)}: this is said when a model is loaded, and {url:.200} has loaded its own",
                hint="give it to `lorax serve`; --use NAME names an adapter of the server",
            )
        return Server.at(url)

    def chosen_adapter(self, path: str, use: str | None) -> str | dict[str, float] | None:
        """The adapter that answers: see `lorax_core.cli.options.chosen_adapter`."""
        given = self.options.get("adapters", {})
        # Those of lorax.toml are there to be chosen, and do not answer unless they are.
        return chosen_adapter(self.options_of(path)["adapters"] if use is not None else given, use)

    @contextlib.contextmanager
    def engine(
        self, path: str, *, about: Mapping[str, Mapping[str, Any]] | None = None, **more: Any
    ) -> Iterator[Engine]:
        """The engine for MODEL, closed at the end; `more` are further options, of which None leaves one out.

        `about` says of adapters what their files do not, as `AdapterOptions`.
        """
        self._check_names(path)
        if is_address(url := self.options_of(path)["checkpoint"]):
            raise RequestError(
                f"{url:.200} is a server, and this loads a model",
                hint="`lorax generate`, `lorax chat` and `lorax bench` ask servers; docs/serving.md has the routes of the rest",
            )
        options = self.options_of(path) | {name: value for name, value in more.items() if value is not None}
        for name, said in (about or {}).items():
            given = options["adapters"][name]
            options["adapters"][name] = {**(given if isinstance(given, dict) else {"source": given}), **said}
        # Only loading: what is done with the engine belongs on stdout.
        with data_only_stdout(), shown_progress() as progress, self._near(path):
            engine = lorax_core.load(**options, progress=progress)
        with engine:
            yield engine

    def _check_names(self, path: str) -> None:
        """Raises RequestError when lorax.toml gives a model what is no option of an engine, though `load` may take it."""
        from lorax_core.options import EngineOptions

        names = [name for name in EngineOptions.model_fields if name != "checkpoint"]
        for name in self.config.models.get(path, {}):
            if name not in ("path", *names):
                close = nearest(name, names)
                hint = f"did you mean {close!r}?" if close else f"there are path, {', '.join(names)}"
                raise RequestError(f"{self.config.file}: [models.{path}] has no {name!r}", hint=hint)

    @contextlib.contextmanager
    def _near(self, path: str) -> Iterator[None]:
        """What is no checkpoint may be a server, or the misspelt name of a model of lorax.toml."""
        try:
            yield
        except CheckpointError as error:
            if looks_like_address(path):
                hint = f"the address of a server begins with http://, such as http://{path:.200}"
                raise CheckpointError(error.message, hint=hint) from error
            close = None if path in self.config.models or os.path.exists(path) else nearest(path, self.config.models)
            if close is None:
                raise
            hint = f"did you mean {close!r}, a model of {self.config.file}?"
            raise CheckpointError(error.message, hint=hint) from error


def loads_model(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the flags of loading. What they say is passed as its keyword `loading`, a `Loading`."""
    return with_flags(command, "loading", _FLAGS, _said)


def _said(context: typer.Context, given: dict[str, Any]) -> Loading:
    options = {**given, "adapters": named_sources(given["adapter"] or [])}
    del options["adapter"]
    said = {name: value for name, value in options.items() if value is not None}
    typed = {name for name in given if _is_typed(context, name)}
    if "adapter" in typed:
        typed.add("adapters")
    return Loading(said, context.find_object(Config) or Config(), frozenset(typed))


def _is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")
