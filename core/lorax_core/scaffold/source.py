"""What a new package is made from: a class of transformers, a `config.json`, or a model id in the local cache.

Decides which classes of transformers belong to it, by transformers' own tables. Runs no remote code and downloads nothing;
knows nothing of what the classes compute.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lorax_core.errors import CheckpointError, PluginError, nearest, shown
from lorax_core.types import Task
from lorax_core.untrusted import read_json
from lorax_core.weights.hub import is_hub_id

FORMS: Final = "give transformers:Gemma2ForCausalLM, the path of a config.json, or a model id that is in the cache"
_UNLISTED: Final = re.compile(r'getattr\((?:self\.)?config, *"(\w+)"')
_TABLES: Final = {
    Task.GENERATE: "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    Task.EMBED: "MODEL_MAPPING_NAMES",
    Task.TOKEN_CLASSIFICATION: "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    Task.SEQUENCE_CLASSIFICATION: "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}


@dataclass(frozen=True)
class Source:
    """An architecture of transformers.

    `classes` has the class that answers each task, `others` those whose heads core has no task for. `stated` are the values of
    a `config.json`, empty for a class.
    """

    model_type: str
    config_class: Any
    classes: Mapping[Task, Any]
    others: tuple[Any, ...]
    stated: Mapping[str, Any]

    @property
    def stem(self) -> str:
        """What the names of its classes begin with: `Gemma2`."""
        return str(self.config_class.__name__).removesuffix("Config")

    @property
    def unlisted(self) -> tuple[str, ...]:
        """Fields that the class does not have, and that its models read where a file states them."""
        text = inspect.getsource(sys.modules[self.classes[Task.EMBED].__module__])
        return tuple(dict.fromkeys(_UNLISTED.findall(text)))


def read_source(given: str) -> Source:
    """The architecture that `given` names, in one of `FORMS`.

    Raises PluginError for a class, file, id or model type that is not there, CheckpointError for a file that cannot be read.
    """
    if given.startswith("transformers:"):
        return _of_class(given.removeprefix("transformers:"))
    path = Path(given)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file() or given.endswith(".json"):
        return _of_file(path)
    if is_hub_id(given):
        return _of_file(_cached(given))
    raise PluginError(f"{shown(given)} names no architecture", hint=FORMS)


def _of_class(name: str) -> Source:
    import transformers

    found = getattr(transformers, name, None) if name.isidentifier() else None
    config_class = found if name.endswith("Config") else getattr(found, "config_class", None)
    if found is None or not getattr(config_class, "model_type", ""):
        models = [each for each in dir(transformers) if each.endswith(("Model", "Config")) or "For" in each]
        close = nearest(name, models)
        raise PluginError(
            f"transformers {transformers.__version__} has no model class {shown(name)}",
            hint=f"did you mean transformers:{close}?" if close else FORMS,
        )
    return _with_classes(config_class, {})


def _of_file(path: Path) -> Source:
    from transformers import CONFIG_MAPPING

    stated = read_json(path, CheckpointError)
    if not isinstance(stated, dict) or not isinstance(stated.get("model_type"), str):
        raise CheckpointError(f"'{path}' states no model_type", hint="give the config.json of a checkpoint")
    model_type = stated["model_type"]
    if model_type not in CONFIG_MAPPING:
        close = nearest(model_type, list(CONFIG_MAPPING))
        own = "its own code (auto_map) is never run" if "auto_map" in stated else f"the nearest is {close!r}"
        raise PluginError(
            f"transformers has no model type {shown(model_type)}, which '{path}' states; {own}",
            hint="write the package by hand, after docs/plugins.md, or upgrade transformers",
        )
    return _with_classes(CONFIG_MAPPING[model_type], stated)


def _cached(model_id: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model_id, "config.json")
    if not isinstance(found, str):
        raise PluginError(
            f"the config.json of {shown(model_id)} is not in the local cache, and nothing is downloaded",
            hint=f"fetch it: hf download {model_id} config.json",
        )
    return Path(found)


def _with_classes(config_class: Any, stated: Mapping[str, Any]) -> Source:
    import transformers
    from transformers.models.auto import modeling_auto

    model_type = str(config_class.model_type)
    classes: dict[Task, Any] = {}
    for task, table in _TABLES.items():
        name = getattr(modeling_auto, table).get(model_type)
        # Some model types have several base models; the first is the usual one.
        name = name[0] if isinstance(name, tuple | list) else name
        found = getattr(transformers, name, None) if name else None
        if found is not None and getattr(found, "config_class", None) is config_class:
            classes[task] = found
    if Task.EMBED not in classes:
        raise PluginError(
            f"transformers has no base model for {model_type!r}, such as {config_class.__name__.removesuffix('Config')}Model",
            hint="give an architecture that AutoModel knows",
        )
    return Source(model_type, config_class, classes, tuple(_others(config_class, classes.values())), stated)


def _others(config_class: Any, known: Iterable[Any]) -> list[Any]:
    """Classes of the same configuration with other heads, in the order of their module."""
    known = tuple(known)
    module = importlib.import_module(known[0].__module__)
    named = [getattr(module, name, None) for name in getattr(module, "__all__", ())]
    return [
        each
        for each in named
        if isinstance(each, type) and getattr(each, "config_class", None) is config_class and each not in known
        if not each.__name__.endswith("PreTrainedModel")
    ]
