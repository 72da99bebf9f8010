"""What the models of all APIs have in common.

Decides that a field which is not known is refused by name, as is one that is known and not honoured. Knows nothing of any API.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError

from lorax_core.errors import nearest, shown
from lorax_core.server.errors import KINDS, ErrorKind, Refused
from lorax_core.server.options import ServerOptions
from lorax_core.untrusted import unusable

# Where in a request a field is, and which of its kinds failed.
_NO_FIELDS: Final = frozenset(("body", "query", "path", "header", "str", "int", "float", "bool", "dict", "list"))
_ENTRIES: Final = 10_000
"""Entries of the largest table in a body, such as `logit_bias`."""
_SCHEMA: Final = "GET /openapi.json says what each field takes"


def _fail_fast(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for part in schema.values():
            _fail_fast(part)
    elif isinstance(schema, (list, tuple)):
        for part in schema:
            _fail_fast(part)


class Body(BaseModel):
    """Base of what clients send: unknown fields are errors, and no input is echoed by pydantic."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Lists are given up at their first wrong element: an error for each of millions takes all memory."""
        schema = handler(source)
        _fail_fast(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, value: Any) -> Any:
        # Before pydantic's own error for these, which does not know what was meant.
        if isinstance(value, dict):
            _check_sizes(value)
            fields = [field.alias or name for name, field in cls.model_fields.items()]
            for name in value:
                if name not in fields and name not in cls.model_fields:
                    lacking = [
                        one
                        for one, field in zip(fields, cls.model_fields.values(), strict=True)
                        if field.is_required() and one not in value
                    ]
                    close = nearest(name, lacking or fields)
                    meant = f"; did you mean {close!r}?" if close else f"; {lacking[0]!r} is missing" if lacking else ""
                    raise PydanticCustomError(
                        "unknown_parameter", "unknown parameter {name}{meant}",
                        {"name": shown(name), "meant": meant, "param": name.encode("utf-8", "backslashreplace").decode()},
                    )  # fmt: skip
        return value


def _check_sizes(body: Mapping[str, Any]) -> None:
    """Raises for a table of too many entries, of which each may be wrong."""
    for name, value in body.items():
        if isinstance(value, dict) and len(value) > _ENTRIES:
            raise PydanticCustomError(
                "too_many", "{name} has more than {most} entries", {"name": shown(name), "most": _ENTRIES}
            )


def unsupported(*harmless: Any, instead: str = "") -> Any:
    """A field that has a meaning elsewhere and none here: it takes the values that change nothing, with which clients send it
    anyway, and null. `instead` says what to do.
    """
    about = "Not supported" + (f"; {instead}" if instead else "")
    return Field(default=None, description=f"{about}.", json_schema_extra={"enum": [None, *harmless]})


class StrictBody(Body):
    """Values of another kind are errors: "5" is no number. What is not supported is one by name."""

    model_config = ConfigDict(strict=True)

    @classmethod
    def unsupported(cls) -> dict[str, list[Any]]:
        """The fields that are, and the values that each may have."""
        found = {name: _harmless(field) for name, field in cls.model_fields.items()}
        return {name: values for name, values in found.items() if values is not None}

    @model_validator(mode="after")
    def _supported(self) -> Self:
        for name in self.model_fields_set:
            value, values = getattr(self, name), _harmless(type(self).model_fields[name])
            if values is not None and value not in values:
                raise PydanticCustomError(
                    "unknown_parameter", "{param}: {value} is not supported by this server; {instead}",
                    {"value": shown(value), "param": name, "instead": _instead(type(self).model_fields[name])},
                )  # fmt: skip
        return self


def _instead(field: FieldInfo) -> str:
    """What to do about a field that `unsupported` made."""
    return (field.description or "").partition("; ")[2].rstrip(".") or "leave it out"


def _harmless(field: FieldInfo) -> list[Any] | None:
    """Values of a field that `unsupported` made; None for others."""
    extra: Any = field.json_schema_extra
    return extra.get("enum") if isinstance(extra, dict) else None


class AnswerShape(BaseModel):
    """Base of answers: nothing comes that is not described."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetail(AnswerShape):
    """What is wrong: the `param` of the request, the error's `code`, and what to do next (`hint`)."""

    message: str
    type: str
    param: str | None
    code: str | None
    hint: str | None = None


class OpenAIError(AnswerShape):
    """The answer to a request that failed, as OpenAI's clients read it."""

    error: ErrorDetail


def failures(shape: type[BaseModel], status: Callable[[ErrorKind], int]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route whose errors have this shape, and these statuses."""
    found: dict[int | str, list[str]] = {}
    for name, kind in KINDS.items():
        found.setdefault(status(kind), []).append(name.replace("_", " "))
    described = {code: {"model": shape, "description": ", ".join(names)} for code, names in found.items()}
    # Where none is 422, FastAPI would describe its own.
    return described | (
        {} if 422 in found else {"4XX": {"model": shape, "description": "any other error of a request"}}
    )


def invalid(errors: Sequence[ErrorDetails | Mapping[str, Any]]) -> Refused:
    """What FastAPI found wrong with a request, as one error that names the field, its value and what is valid."""
    worst = max(errors, key=_fits)
    steps = [step for step in worst["loc"] if step not in _NO_FIELDS]
    param = ".".join(map(str, _fields(worst["loc"]))) or None
    if worst["type"] == "json_invalid":
        said, at = worst.get("ctx", {}).get("error"), worst["loc"][-1]
        where = f": {said} at character {at}" if said and isinstance(at, int) else ""
        return Refused("invalid", f"the body is not JSON{where}", hint="check its quotes, commas and brackets")
    if not steps and isinstance(worst.get("input"), bytes):  # FastAPI reads no body that is not said to be JSON
        return Refused(
            "invalid", "the Content-Type of the body is not JSON", hint="send 'Content-Type: application/json'"
        )
    if worst["type"] == "unknown_parameter":
        name = str(worst["ctx"]["param"])[:100]
        return Refused("invalid", worst["msg"], hint=_SCHEMA, param=f"{param}.{name}" if param else name)
    message = worst["msg"].removeprefix("Value error, ")
    hidden = worst["type"] == "missing" or isinstance(worst.get("input"), (dict, list))
    found = "" if hidden else f" (found {shown(worst.get('input'))})"
    return Refused("invalid", message + found, hint=_SCHEMA, param=param)


def _fields(location: Sequence[int | str]) -> list[int | str]:
    """The fields and places in lists of a location. Where several things may be, pydantic has the names of these too, which are
    models or types; fields are written small.
    """
    steps = (step for step in location if step not in _NO_FIELDS)
    return [step for step in steps if isinstance(step, int) or (step.isidentifier() and step.islower())]


def _fits(error: ErrorDetails | Mapping[str, Any]) -> tuple[bool, int, bool, int]:
    """Of a field that may be several things, how near an error comes to what was meant: the nearest fails deepest, over its
    value and not over its kind, and last in a list.
    """
    last = next((step for step in reversed(error["loc"]) if isinstance(step, int)), -1)
    return error["type"] == "unknown_parameter", len(_fields(error["loc"])), not error["type"].endswith("_type"), last


def check_size(constraint: Any, limits: ServerOptions, param: str) -> None:
    """Raises Refused for a schema or expression that is larger than this server reads."""
    if (problem := unusable(constraint)) is not None:
        raise Refused("invalid", f"it {problem}", hint="give plain JSON", param=param)
    size = len(constraint) if isinstance(constraint, str) else len(json.dumps(constraint))
    if size > limits.max_schema_chars:
        raise Refused(
            "invalid",
            f"it has {size:,} characters, and {limits.max_schema_chars:,} are read",
            hint="make it simpler, or start the server with a larger --max-schema-chars",
            param=param,
        )
