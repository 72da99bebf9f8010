"""`lorax.toml`: models by name, and options that one would type again and again.

Decides where the file is found and what it may say. Knows nothing of what options mean: a subcommand reads its own.

    [models.small]                      # `lorax generate small ...`
    path = "examples/tiny_qwen2/model"
    adapters.upper = "examples/tiny_qwen2/adapters/upper"
    adapters.topic = {source = "examples/tiny_qwen2/adapters/topic", id2label = {0 = "numbers", 1 = "files", 2 = "tests"}}
    dtype = "float32"

    [generate]                          # options of `lorax generate`, below those on the command line
    max-tokens = 64
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lorax_core.errors import RequestError, listed, nearest
from lorax_core.untrusted import unusable

FILE: Final = "lorax.toml"
_SIZE: Final = 64 * 2**10
"""Bytes of the largest file: it is typed by people."""
_SHOWN: Final = "docs/cli.md shows what it may hold"


@dataclass(frozen=True, slots=True)
class Config:
    """What a `lorax.toml` says: loading options by the name of a model, and options by subcommand."""

    file: Path | None = None
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    commands: Mapping[str, Any] = field(default_factory=dict)


def find_config(given: Path | None, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The file that was given, or `lorax.toml` in this folder, or else in the folder of the user's settings (XDG)."""
    if given is not None:
        return given
    settings = Path(environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME") or "/", ".config"), "lorax")
    return next((one for one in (Path(FILE), settings / FILE) if one.is_file()), None)


def read_config(file: Path | None, commands: Collection[str]) -> Config:
    """What a file says; nothing for None. Raises RequestError for a file that is not as it should be."""
    if file is None:
        return Config()
    # Late: most commands run without a file.
    import tomllib

    try:
        with file.open("rb") as opened:
            content = opened.read(_SIZE + 1)
        if len(content) > _SIZE:
            raise RequestError(f"{file} is larger than {_SIZE:,} bytes", hint="give a lorax.toml with --config FILE")
        found = tomllib.loads(content.decode())
    # RecursionError: the parser recurses into lists.
    except (OSError, ValueError, RecursionError) as error:
        cause = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise RequestError(f"{file} cannot be read: {cause}", hint=_SHOWN) from error
    problem = unusable(found)
    if problem is not None:
        raise RequestError(f"{file} {problem}", hint=_SHOWN)
    for name, value in found.items():
        if name not in ("models", *commands):
            raise RequestError(
                f"{file}: no table is called {name!r}; there are models and the subcommands {listed(commands, limit=20)}",
                hint=_meant(name, ("models", *commands)) or _SHOWN,
            )
        if not isinstance(value, dict):
            raise RequestError(f"{file}: {name!r} is a table of options", hint=f"[{name}]")
    models = found.pop("models", {})
    return Config(file, {name: _model(file, name, options) for name, options in models.items()}, found)


def flag_defaults(config: Config, command: Any, name: str) -> dict[str, Any]:
    """What a file gives to a subcommand (a click command) and those below it, as click's `default_map`.

    Raises RequestError for an option that it does not have.
    """
    return _defaults(config, command, name, config.commands.get(name, {}))


def _defaults(config: Config, command: Any, name: str, table: Mapping[str, Any]) -> dict[str, Any]:
    below = getattr(command, "commands", {})
    flags = {flag.name: flag for flag in command.params}
    found: dict[str, Any] = {}
    for key, value in table.items():
        where = f"{config.file}: [{name}]"
        if key in below:
            if not isinstance(value, dict):
                raise RequestError(f"{where}: {key!r} is a table of options", hint=f"[{name}.{key}]")
            found[key] = _defaults(config, below[key], f"{name}.{key}", value)
        elif (flag := flags.get(key.replace("-", "_"))) is not None:
            # Else true would be the number 1, or the text "True".
            if isinstance(value, bool) and not getattr(flag, "is_flag", False):
                hint = f"lorax {name.replace('.', ' ')} --help says what it takes"
                raise RequestError(f"{where}: {key!r} is not true or false", hint=hint)
            if getattr(flag, "multiple", False) and not isinstance(value, list):
                raise RequestError(f"{where}: {key!r} is a list", hint=f"{key} = [...]")
            found[flag.name] = value
        else:
            valid = [*below, *(flag.replace("_", "-") for flag in flags)]
            hint = _meant(key, valid) or f"lorax {name.replace('.', ' ')} --help lists what there is"
            raise RequestError(f"{where} has no {key!r}", hint=hint)
    return found


def _model(file: Path, name: str, options: Any) -> dict[str, Any]:
    if not isinstance(options, dict) or not isinstance(options.get("path"), str):
        raise RequestError(f"{file}: [models.{name}] has no path", hint='path = "FOLDER or hub id"')
    found = {key.replace("-", "_"): value for key, value in options.items()}
    # Paths in a file are read from where the file lies, as one who moves around expects.
    found["path"] = _beside(file, found["path"])
    adapters = found.get("adapters", {})
    if not isinstance(adapters, dict) or not all(isinstance(_source(one), str) for one in adapters.values()):
        hint = '{upper = "FOLDER"}, or {topic = {source = "FOLDER", id2label = {0 = "no"}}}'
        raise RequestError(f"{file}: adapters of [models.{name}] are names and sources", hint=hint)
    found["adapters"] = {
        key: {**one, "source": _beside(file, one["source"])} if isinstance(one, dict) else _beside(file, one)
        for key, one in adapters.items()
    }
    return found


def _source(adapter: Any) -> Any:
    """The source of an adapter, which is all that is said of it, or one of its options."""
    return adapter.get("source") if isinstance(adapter, dict) else adapter


def _beside(file: Path, source: str) -> str:
    """A folder beside the file, where there is one; else the source as it is, which may be a hub id or a URL."""
    # Of `os.path`, which finds no home and no file where `Path` raises: loading says what is wrong with a source.
    folder = os.path.join(file.parent, os.path.expanduser(source))
    return str(Path(folder)) if os.path.exists(folder) else source


def _meant(name: str, valid: Collection[str]) -> str | None:
    close = nearest(name, valid)
    return f"did you mean {close!r}?" if close else None
