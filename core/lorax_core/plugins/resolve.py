"""Resolves names: an import path to its class or cases, a checkpoint folder to its `config.json`.

Decides what the error for a failed import or a bad `config.json` says, and which package is known to provide which
architecture. Knows nothing of discovery, and imports torch only where the requested module does.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lorax_core.errors import CheckpointError, PluginError, nearest
from lorax_core.plugins.cases import ArchitectureCases
from lorax_core.untrusted import guarded, read_json

if TYPE_CHECKING:
    from os import PathLike

    from lorax_core.plugins.record import PluginRecord
    from lorax_core.plugins.spec import ArchitectureSpec

INSTALL_HINTS: Final = {
    "bert": "lorax-bert",
    "camembert": "lorax-roberta",
    "distilbert": "lorax-distilbert",
    "gemma2": "lorax-gemma2",
    "gpt2": "lorax-gpt2",
    "gpt_neox": "lorax-neox",
    "llama": "lorax-llama",
    "mistral": "lorax-llama",
    "modernbert": "lorax-modernbert",
    "qwen2": "lorax-qwen2",
    "qwen3": "lorax-qwen3",
    "roberta": "lorax-roberta",
    "xlm-roberta": "lorax-roberta",
}
"""The package that provides a model type, where core knows of one. The only model types named in core."""


def load_class(path: str, record: PluginRecord | None) -> type:
    """Imports the class `"package.module:Class"`; `record` is the plugin that named it, None for one of core's own.

    Raises `PluginError`, which names plugin, module and cause, when the module cannot be imported or has no such class.
    """
    found = _load(path, record)
    if not isinstance(found, type):
        raise PluginError(f"{_owner(record)}: {path} is not a class but {found!r}", hint=_repair(None, record))
    return found


def load_cases(spec: ArchitectureSpec, record: PluginRecord | None) -> ArchitectureCases:
    """Imports what the conformance kit needs to test an architecture.

    Raises `PluginError`, which names plugin, module and cause, when there is no such object or it is invalid.
    """
    found = _load(spec.cases, record)
    if not isinstance(found, ArchitectureCases):
        kind = "an ArchitectureCases"
        hint = f"{spec.cases.partition(':')[2]} = ArchitectureCases(tiny_config=..., references=...)"
        raise PluginError(f"{_owner(record)}: {spec.cases} is not {kind} but {found!r:.80}", hint=hint)
    return found


def _load(path: str, record: PluginRecord | None) -> object:
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        # Any exception: a plugin's module may run anything at import.
        cause = f"{type(error).__name__}: {error}"
        message = f"{_owner(record)}: importing {module_name} failed: {cause}"
        raise PluginError(message, hint=_repair(error, record)) from error
    try:
        return getattr(module, name)
    except AttributeError as error:
        kind = "object" if name.isupper() else "class"
        close = nearest(name, [known for known, value in vars(module).items() if _is_like(name, value)])
        raise PluginError(
            f"{_owner(record)}: module {module_name} has no {kind} {name!r}",
            hint=f"did the plugin mean {close!r}?" if close else _repair(error, record),
        ) from error


def _is_like(name: str, value: object) -> bool:
    return isinstance(value, ArchitectureCases if name.isupper() else type)


def _owner(record: PluginRecord | None) -> str:
    return "lorax-core" if record is None else f"plugin {record.name!r} ({record.package} {record.version})"


def _repair(error: Exception | None, record: PluginRecord | None) -> str:
    package = "lorax-core" if record is None else record.package
    if isinstance(error, ModuleNotFoundError) and error.name:
        # The top-level name: of `a.b` that is missing, what can be installed is most often called `a`.
        missing = error.name.partition(".")[0]
        return f"is {missing!r} installed? `pip install --upgrade {package}` installs the dependencies of {package}"
    return f"pip install --upgrade {package}"


def read_config(path: str | PathLike[str]) -> dict[str, Any]:
    """The `config.json` of a checkpoint folder.

    Raises `CheckpointError` when the folder or the file is missing or unreadable, is not JSON (with the line), is not
    an object, or names no `model_type`.
    """
    folder = Path(path)
    file = folder / "config.json"
    # A name that is too long, or none at all.
    with guarded(CheckpointError, f"{str(folder)!r:.200} is not a folder", "give the folder that holds config.json"):
        is_folder = folder.is_dir()
    if not is_folder:
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"checkpoint folder '{folder}' {what}", hint="give the folder that holds config.json")
    if not os.path.lexists(file):  # a pipe or a broken link is there, and reading it says what it is
        hint = "a checkpoint holds config.json and *.safetensors; is this its folder?"
        if (folder / "adapter_config.json").is_file():
            hint = "this is an adapter: load its base, with adapters={'NAME': FOLDER}"
        raise CheckpointError(f"'{folder}' has no config.json", hint=hint)
    config = read_json(file, CheckpointError)
    if not isinstance(config, dict):
        raise CheckpointError(
            f"'{file}' holds {_kind(config)} where a JSON object belongs", hint="download or copy it again"
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        says = "names no model_type" if model_type is None else f"has {model_type!r} for model_type"
        raise CheckpointError(f"'{file}' {says}", hint='"model_type" holds the name of the architecture')
    return config


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "null")
