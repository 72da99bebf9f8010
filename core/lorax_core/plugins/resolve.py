"""From names to things: a class path to its class, a checkpoint folder to its `config.json`.

Decides how a failed import or a bad `config.json` is told, and which package is known to bring which architecture.
Knows nothing of discovery, and imports torch only where the class asked for does.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lorax_core.errors import CheckpointError, PluginError, nearest

if TYPE_CHECKING:
    from os import PathLike

    from lorax_core.plugins.record import PluginRecord

INSTALL_HINTS: Final = {
    "bert": "lorax-bert",
    "camembert": "lorax-roberta",
    "distilbert": "lorax-distilbert",
    "gpt2": "lorax-gpt2",
    "gpt_neox": "lorax-neox",
    "qwen2": "lorax-qwen2",
    "roberta": "lorax-roberta",
    "xlm-roberta": "lorax-roberta",
}
"""The package that brings a model type, where core knows of one. The only model types named in core."""


def load_class(path: str, record: PluginRecord | None) -> type:
    """Imports the class `"package.module:Class"`; `record` is the plugin that named it, None for one of core's own.

    Raises `PluginError`, which names plugin, module and cause, when the module cannot be imported or has no such class.
    """
    module_name, _, class_name = path.partition(":")
    whose = "lorax-core" if record is None else f"plugin {record.name!r} ({record.package} {record.version})"
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        raise PluginError(f"{whose}: importing {module_name} failed: {cause}", hint=_mend(error, record)) from error
    try:
        found = getattr(module, class_name)
    except AttributeError as error:
        close = nearest(class_name, [name for name, value in vars(module).items() if isinstance(value, type)])
        raise PluginError(
            f"{whose}: module {module_name} has no class {class_name!r}",
            hint=f"did the plugin mean {close!r}?" if close else _mend(error, record),
        ) from error
    if not isinstance(found, type):
        raise PluginError(f"{whose}: {path} is not a class but {found!r}", hint=_mend(None, record))
    return found


def _mend(error: Exception | None, record: PluginRecord | None) -> str:
    package = "lorax-core" if record is None else record.package
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = error.name.partition(".")[0]
        return f"is {missing!r} installed? `pip install --upgrade {package}` brings what {package} declares to need"
    return f"pip install --upgrade {package}"


def read_config(path: str | PathLike[str]) -> dict[str, Any]:
    """The `config.json` of a checkpoint folder.

    Raises `CheckpointError` when the folder or the file is missing or unreadable, is not JSON (with the line), is not
    an object, or names no `model_type`.
    """
    folder = Path(path)
    file = folder / "config.json"
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"checkpoint folder '{folder}' {what}", hint="give the folder that holds config.json")
    if not file.is_file():
        hint = "a checkpoint holds config.json and *.safetensors; is this its folder?"
        raise CheckpointError(f"'{folder}' has no config.json", hint=hint)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"'{file}' is not JSON: {error.msg} in line {error.lineno}, column {error.colno}",
            hint="download the checkpoint again",
        ) from error
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"'{file}' cannot be read: {error}", hint="download the checkpoint again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"'{file}' holds {_kind(config)} where a JSON object belongs")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        says = "names no model_type" if model_type is None else f"has {model_type!r} for model_type"
        raise CheckpointError(f"'{file}' {says}", hint='"model_type" holds the name of the architecture')
    return config


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "null")
