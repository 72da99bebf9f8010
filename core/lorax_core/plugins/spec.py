"""What a plugin declares: one architecture, one attention backend.

Decides which declarations are sound. Knows nothing of where a plugin comes from or how its classes compute: classes are
named by strings, so a spec is plain data that survives JSON and pickle and never imports torch.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from lorax_core.errors import PluginError
from lorax_core.types import Task

API_VERSION: Final = 1
"""Generation of the plugin API that this core speaks; a spec names the one it was written for."""


class Incompatible(PluginError):
    """A plugin was made for another core: another version of it, or another generation of the plugin API."""


def _class_path(value: str) -> str:
    module, colon, name = value.partition(":")
    if colon and name.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return value
    raise ValueError(f"{value!r} is not a class path; write 'package.module:Class'")


def _key(value: str) -> str:
    if value and value[0].isalnum() and all(char.isalnum() or char in "._-" for char in value):
        return value
    raise ValueError(f"{value!r} is not a name; use letters, digits, '.', '_' and '-'")


def _one_line(value: str) -> str:
    if value.strip() and "\n" not in value:
        return value
    raise ValueError(f"{value!r} is not one line of text")


def _json_object(value: dict[str, Any]) -> dict[str, Any]:
    # Through JSON and back: the author's later changes to his dict do not reach the spec, and tuples become lists now
    # and not at the first round trip.
    try:
        copy: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"not JSON: {error}") from error
    return copy


ClassPath = Annotated[str, AfterValidator(_class_path)]
Key = Annotated[str, AfterValidator(_key)]
Line = Annotated[str, AfterValidator(_one_line)]
JsonObject = Annotated[dict[str, Any], AfterValidator(_json_object)]
Feature = Literal["token_types", "sliding_window", "tied_embeddings"]


class ArchitectureSpec(BaseModel):
    """One architecture: everything that core must know before it imports a line of the plugin's model code.

    Building one raises `pydantic.ValidationError` for a field that is missing, misspelt or unsound, and `Incompatible`
    for an `api` that this core does not speak. LoRA needs no declaration: it follows from core's layers.

    - `model_type`: the key, as in a checkpoint's `config.json`.
    - `api`: an integer literal, the `API_VERSION` that the author wrote against (imported, it would always match).
    - `config`, `backbone`, `heads`: class paths `"package.module:Class"`.
    - `hf_architectures`: which task a checkpoint serves, by the class name in its `config.json`.
    - `causal`: whether rows attend only backwards; generating needs it.
    - `tiny_config`: a configuration under a million parameters, for tests; `tiny_variants` name changes to it.
    - `references`: the class that answers the same task independently, an oracle for tests.
    - `known_failures`: `{check of the conformance kit: reason}`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: Key
    summary: Line
    examples: tuple[Line, ...] = ()
    api: int
    config: ClassPath
    backbone: ClassPath
    heads: dict[Task, ClassPath] = Field(min_length=1)
    hf_architectures: dict[str, Task]
    default_task: Task
    causal: bool
    features: tuple[Feature, ...] = ()
    tiny_config: JsonObject
    tiny_variants: dict[Key, JsonObject] = {}
    references: dict[Task, ClassPath] = {}
    known_failures: dict[str, Line] = {}

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that have a head, in the order of declaration."""
        return tuple(self.heads)

    @model_validator(mode="before")
    @classmethod
    def _api_first(cls, data: Any) -> Any:
        # Before the fields: a spec of another generation may have fields that this one cannot judge.
        api = data.get("api") if isinstance(data, dict) else None
        if type(api) is int and api != API_VERSION:
            raise Incompatible(
                f"{data.get('model_type')!r} is declared for plugin API {api}; this core speaks {API_VERSION}",
                hint="upgrade the plugin" if api < API_VERSION else "upgrade lorax-core",
            )
        return data

    @field_validator("api", mode="before")
    @classmethod
    def _api_is_literal(cls, value: Any) -> Any:
        if type(value) is not int:
            raise ValueError(f"{value!r} is not an integer literal; write api={API_VERSION}")
        return value

    @model_validator(mode="after")
    def _tasks_have_heads(self) -> ArchitectureSpec:
        tasks = ", ".join(self.heads)
        if self.default_task not in self.heads:
            raise ValueError(f"default_task {str(self.default_task)!r} has no head; heads are for: {tasks}")
        for task in self.references:
            if task not in self.heads:
                raise ValueError(f"references names task {str(task)!r}, which has no head; heads are for: {tasks}")
        if Task.GENERATE in self.heads and not self.causal:
            raise ValueError("a head for 'generate' needs causal=True")
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
