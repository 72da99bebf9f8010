"""Loading and unloading adapters over HTTP, for clients with the admin key.

Decides what an operator is told of adapters, and that what is loaded so is bounded in size. Knows nothing of files.
"""

from __future__ import annotations

from typing import Any, Final, Literal, cast

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import ConfigDict, Field, SecretStr

from lorax_core.adapters.residency.handle import AdapterInfo
from lorax_core.errors import listed, nearest
from lorax_core.server.errors import Refused
from lorax_core.server.gateway import Gateway
from lorax_core.server.schemas import AnswerShape, OpenAIError, StrictBody, failures, unsupported
from lorax_core.serving.requests import NAME_LENGTH

_Task = Literal["generate", "embed", "token-classification", "sequence-classification"]
_Problem = Literal["regression", "single_label_classification", "multi_label_classification"]
_DESCRIBED: Final[dict[str, Any]] = {"responses": failures(OpenAIError, lambda kind: kind.status)}
_SAID: Final[dict[str, Any]] = {
    "response_class": Response,  # else errors would be described as text too
    "responses": _DESCRIBED["responses"]
    | {200: {"description": "Done.", "content": {"text/plain": {"schema": {"type": "string"}}}}},
}


class LoadBody(StrictBody):
    """An adapter under the name that requests call it by, in place of the one that has it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "upper", "source": "org/name"}]})

    name: str = Field(min_length=1, max_length=NAME_LENGTH)
    source: str = Field(min_length=1, max_length=NAME_LENGTH, description="A folder, a hub id, or the URL of a folder.")
    revision: str | None = Field(default=None, max_length=NAME_LENGTH)
    token: SecretStr | None = Field(default=None, description="Of a private repository of the hub.")
    task: _Task | None = Field(default=None, description="Of its own head, where its files do not say it.")
    problem_type: _Problem | None = None
    id2label: dict[str, str] | None = Field(default=None, description="Labels of its own head by their numbers.")
    pin: bool = Field(default=False, description="Once on the device it stays there.")


class VllmLoadBody(StrictBody):
    """The same as vLLM's clients say it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"lora_name": "upper", "lora_path": "org/name"}]})

    lora_name: str = Field(min_length=1, max_length=NAME_LENGTH)
    lora_path: str = Field(min_length=1, max_length=NAME_LENGTH)
    load_inplace: bool = Field(default=False, description="In place of the one that has the name.")
    base_model_name: Any = unsupported(instead="an adapter is checked against the base")


class VllmUnloadBody(StrictBody):
    """An adapter's name."""

    lora_name: str = Field(min_length=1, max_length=NAME_LENGTH)
    lora_int_id: Any = unsupported(instead="adapters have names alone")


class LoadedAdapter(AnswerShape):
    """A loaded adapter. `nbytes` is on the device; `where` is "device", "memory" or "disk"."""

    name: str
    source: str
    revision: str | None
    identity: str
    kind: str
    task: str | None
    ranks: list[int]
    targets: list[str]
    unread: list[str]
    nbytes: int
    where: Literal["device", "memory", "disk"]
    pinned: bool


class AdapterList(AnswerShape):
    """All of them, by name."""

    adapters: list[LoadedAdapter]


class Unloaded(AnswerShape):
    """The name that means nothing any more."""

    name: str
    unloaded: Literal[True]


def adapter_routes(gateway: Gateway) -> APIRouter:
    """The routes of one server; `auth` keeps them for the admin key."""
    routes = APIRouter(tags=["adapters"])
    _own(routes, gateway)
    _as_vllm(routes, gateway)
    return routes


def _own(routes: APIRouter, gateway: Gateway) -> None:
    @routes.get("/v1/adapters", response_model=AdapterList, **_DESCRIBED)
    async def list_adapters() -> Response:
        """The adapters that are loaded."""
        return JSONResponse({"adapters": [_shown(one) for one in gateway.engine.adapters.list()]})

    @routes.post("/v1/adapters", response_model=LoadedAdapter, **_DESCRIBED)
    async def load_adapter(body: LoadBody) -> Response:
        """Load an adapter; what runs goes on meanwhile."""
        _check_name(gateway, body.name, "name")
        options: dict[str, Any] = {"revision": body.revision, "task": body.task, "problem_type": body.problem_type}
        options["token"] = None if body.token is None else body.token.get_secret_value()
        options["id2label"] = _labels(body.id2label)
        return JSONResponse(_shown(await _load(gateway, body.name, body.source, pin=body.pin, **options)))

    @routes.get("/v1/adapters/{name:path}", response_model=LoadedAdapter, **_DESCRIBED)
    async def get_adapter(name: str) -> Response:
        """One adapter that is loaded."""
        return JSONResponse(_shown(_find(gateway, name, "name")))

    @routes.delete("/v1/adapters/{name:path}", response_model=Unloaded, **_DESCRIBED)
    async def unload_adapter(name: str) -> Response:
        """Forget an adapter; requests that began with it are answered with it."""
        _find(gateway, name, "name")
        gateway.engine.adapters.unload(name)
        return JSONResponse({"name": name, "unloaded": True})


def _as_vllm(routes: APIRouter, gateway: Gateway) -> None:
    @routes.post("/v1/load_lora_adapter", **_SAID)
    async def load_lora_adapter(body: VllmLoadBody) -> Response:
        """Load an adapter, as vLLM's clients ask for it."""
        _check_name(gateway, body.lora_name, "lora_name")
        if body.lora_name in gateway.engine.adapters and not body.load_inplace:
            raise Refused(
                "invalid",
                f"{body.lora_name!r:.200} is loaded already",
                hint="set load_inplace, or unload it first",
                param="lora_name",
            )
        await _load(gateway, body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @routes.post("/v1/unload_lora_adapter", **_SAID)
    async def unload_lora_adapter(body: VllmUnloadBody) -> Response:
        """Forget an adapter, as vLLM's clients ask for it."""
        _find(gateway, body.lora_name, "lora_name")
        gateway.engine.adapters.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def _load(gateway: Gateway, name: str, source: str, **options: Any) -> AdapterInfo:
    return await gateway.in_thread(gateway.engine.adapters.load, name, source, bounded=True, **options)


def _check_name(gateway: Gateway, name: str, param: str) -> None:
    """The base keeps its name: requests that name it would get the adapter."""
    if not gateway.names.free(name):
        raise Refused("invalid", f"{name!r:.200} cannot name an adapter", hint="give it another name", param=param)


def _find(gateway: Gateway, name: str, param: str) -> AdapterInfo:
    adapters = gateway.engine.adapters
    found = next((one for one in adapters.list() if one.name == name), None)
    if found is None:
        close = nearest(name[:200], adapters)
        raise Refused(
            "no_model",
            f"no adapter is called {name!r:.200}; loaded are {listed(adapters)}",
            hint=f"did you mean {close!r}?" if close else "GET /v1/adapters lists them",
            param=param,
        )
    return found


def _labels(given: dict[str, str] | None) -> dict[int, str] | None:
    """Labels by number; JSON has text for keys."""
    if given is None:
        return None
    if not all(key.isdecimal() and key.isascii() and len(key) < 10 for key in given):
        raise Refused("invalid", "labels are numbered from 0", hint='{"0": "no", "1": "yes"}', param="id2label")
    return {int(key): label for key, label in given.items()}


def _shown(info: AdapterInfo) -> dict[str, Any]:
    return {name: getattr(info, name) for name in cast("dict[str, Any]", LoadedAdapter.model_fields)}
