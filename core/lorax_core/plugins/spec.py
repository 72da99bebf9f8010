"""What a plugin declares: one architecture, one attention backend.

Decides which declarations are valid and which head answers a task by default. Knows nothing of where a plugin comes from or
how its classes compute: classes are named by strings, so a spec is plain data that survives JSON and pickle and never imports
torch.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from lorax_core.errors import PluginError, listed
from lorax_core.types import Task

# Compared for equality (`_api_first`), so raising it refuses every plugin that was written for the version before.
API_VERSION: Final = 1
"""Version of the plugin API that this core implements; a spec names the one it was written for."""

DECODER_HEADS: Final = {
    Task.GENERATE: "lorax_core.modeling.heads:LanguageModelHead",
    Task.EMBED: "lorax_core.modeling.heads:EmbeddingHead",
    Task.TOKEN_CLASSIFICATION: "lorax_core.modeling.heads:TokenClassificationHead",
    Task.SEQUENCE_CLASSIFICATION: "lorax_core.modeling.heads:LastTokenClassificationHead",
}
"""Default heads of causal architectures."""

ENCODER_HEADS: Final = {
    Task.EMBED: "lorax_core.modeling.heads:EmbeddingHead",
    Task.TOKEN_CLASSIFICATION: "lorax_core.modeling.heads:TokenClassificationHead",
}
"""Default heads of bidirectional architectures. Their sequence classifiers differ (pooler, activation), so none is default."""


class Incompatible(PluginError):
    """A plugin was written for another version of lorax-core or of the plugin API."""


def _is_import_path(value: str) -> bool:
    module, colon, name = value.partition(":")
    return bool(colon) and name.isidentifier() and all(level.isidentifier() for level in module.split("."))


def _class_path(value: str) -> str:
    if _is_import_path(value):
        return value
    raise ValueError(f"{value!r} is not a class path; write 'package.module:Class'")


def _object_path(value: str) -> str:
    if _is_import_path(value):
        return value
    raise ValueError(f"{value!r} is not the path of an object; write 'package.module:NAME'")


def _key(value: str) -> str:
    if value and value[0].isalnum() and all(char.isalnum() or char in "._-" for char in value):
        return value
    raise ValueError(f"{value!r} is not a name; use letters, digits, '.', '_' and '-'")


def _one_line(value: str) -> str:
    if value.strip() and "\n" not in value:
        return value
    raise ValueError(f"{value!r} is not one line of text")


def _json_object(value: dict[str, Any]) -> dict[str, Any]:
    # Through JSON and back: later changes to the author's dict must not reach the model, and tuples become lists now
    # instead of at the first round trip.
    try:
        # allow_nan=False: Python writes NaN, which is no JSON and which other readers refuse.
        copy: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"not JSON: {error}") from error
    return copy


ClassPath = Annotated[str, AfterValidator(_class_path)]
ObjectPath = Annotated[str, AfterValidator(_object_path)]
Key = Annotated[str, AfterValidator(_key)]
Line = Annotated[str, AfterValidator(_one_line)]
JsonObject = Annotated[dict[str, Any], AfterValidator(_json_object)]
Feature = Literal["token_types", "sliding_window", "tied_embeddings"]


class ArchitectureSpec(BaseModel):
    """One architecture: everything that core must know before it imports the plugin's model code.

    Building one raises `pydantic.ValidationError` for a field that is missing, misspelt or invalid, and `Incompatible` for an
    `api` that this core does not implement. LoRA needs no declaration: core's layers support it.

    - `model_type`: the key, as in a checkpoint's `config.json`.
    - `api`: an integer literal, the `API_VERSION` that the plugin was written for (imported, it would always match).
    - `config`, `backbone`: class paths `"package.module:Class"`.
    - `tasks`: what the architecture supports, in the order in which `models list` shows them.
    - `heads`: class paths for the tasks whose head differs from core's default; `head(task)` gives the one in use.
    - `hf_architectures`: the task of a checkpoint, by the class name in its `config.json`.
    - `causal`: whether rows attend only backwards; generating needs it.
    - `cases`: path of the plugin's `ArchitectureCases`, which only the conformance kit imports.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: Key
    summary: Line
    examples: tuple[Line, ...] = ()
    api: int
    config: ClassPath
    backbone: ClassPath
    tasks: tuple[Task, ...] = Field(min_length=1)
    heads: dict[Task, ClassPath] = {}
    hf_architectures: dict[str, Task]
    default_task: Task
    causal: bool
    features: tuple[Feature, ...] = ()
    cases: ObjectPath

    def head(self, task: Task) -> str:
        """Class path of the head that answers `task`; raises PluginError for a task that the architecture lacks."""
        if task not in self.tasks:
            raise PluginError(
                f"{self.model_type!r} does not support {str(task)!r}; it supports {listed(map(str, self.tasks))}"
            )
        return self.heads.get(task) or self._default_heads[task]

    @property
    def _default_heads(self) -> dict[Task, str]:
        return DECODER_HEADS if self.causal else ENCODER_HEADS

    @model_validator(mode="before")
    @classmethod
    def _api_first(cls, data: Any) -> Any:
        # Before the fields: a spec for another version may have fields that this one does not know.
        api = data.get("api") if isinstance(data, dict) else None
        # `type(...) is int`, as True is an int to isinstance. Other types are left to the field's own validator.
        if type(api) is int and api != API_VERSION:
            raise Incompatible(
                f"{data.get('model_type')!r} is declared for plugin API {api}; this core implements {API_VERSION}",
                hint="upgrade the plugin" if api < API_VERSION else "pip install --upgrade lorax-core",
            )
        return data

    @field_validator("api", mode="before")
    @classmethod
    def _api_is_literal(cls, value: Any) -> Any:
        # Before pydantic, which would turn "1" and 1.0 into 1.
        if type(value) is not int:
            raise ValueError(f"{value!r} is not an integer literal; write api={API_VERSION}")
        return value

    @model_validator(mode="after")
    def _tasks_have_heads(self) -> ArchitectureSpec:
        tasks = ", ".join(self.tasks)
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks names a task twice: {tasks}")
        if self.default_task not in self.tasks:
            raise ValueError(f"default_task {str(self.default_task)!r} is not one of its tasks: {tasks}")
        # Rows that see later tokens change with each new one, so a cache of keys and values would be wrong.
        if Task.GENERATE in self.tasks and not self.causal:
            raise ValueError("the task 'generate' needs causal=True")
        for task in self.heads:
            if task not in self.tasks:
                raise ValueError(f"heads names {str(task)!r}, which is not one of its tasks: {tasks}")
        for task in self.tasks:
            if task not in self.heads and task not in self._default_heads:
                raise ValueError(
                    f"core has no default head of bidirectional models for {str(task)!r}: name one, "
                    f"heads={{Task.{task.name}: 'package.modeling:Class'}}, a subclass of SequenceClassificationHead"
                )
        return self


class BackendSpec(BaseModel):
    """One attention backend: its name, its class, the device types that it runs on.

    Building one raises `pydantic.ValidationError`. Among the backends that support a model on a device, the one with
    the highest `priority` is tried first; core's own torch backend has 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Key
    summary: Line
    backend: ClassPath
    device_types: tuple[Key, ...] = Field(min_length=1)
    priority: int = 0
