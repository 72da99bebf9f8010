"""What the models of all APIs have in common.

Decides that a field which is not known is refused by name, as is one that is known and not honoured. Knows nothing of any API.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from lorax_core.errors import nearest, shown
from lorax_core.server.errors import Refused

# Where in a request a field is, and which of its kinds failed.
_NO_FIELDS: Final = frozenset(("body", "query", "path", "header", "str", "int", "float", "bool", "dict", "list"))
_SCHEMA: Final = "GET /openapi.json says what each field takes"


class Body(BaseModel):
    """Base of what clients send: unknown fields are errors, and no input is echoed by pydantic."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, value: Any) -> Any:
        # Before pydantic's own error for these, which does not know what was meant.
        if isinstance(value, dict):
            fields = [field.alias or name for name, field in cls.model_fields.items()]
            for name in value:
                if name not in fields and name not in cls.model_fields:
                    close = nearest(name, fields)
                    meant = f"; did you mean {close!r}?" if close else ""
                    raise PydanticCustomError(
                        "unknown_parameter", "unknown parameter {name}{meant}",
                        {"name": shown(name), "meant": meant, "param": name.encode("utf-8", "backslashreplace").decode()},
                    )  # fmt: skip
        return value


def invalid(errors: Sequence[ErrorDetails | Mapping[str, Any]]) -> Refused:
    """What FastAPI found wrong with a request, as one error that names the field, its value and what is valid."""
    # Of a field that may be several things, the alternative that fits best fails deepest.
    worst = max(errors, key=lambda one: (one["type"] == "unknown_parameter", len(one["loc"])))
    steps = [step for step in worst["loc"] if step not in _NO_FIELDS]
    # Of a field that may be one of several models, pydantic has their names too; fields are written small.
    param = (
        ".".join(str(one) for one in steps if isinstance(one, int) or (one.isidentifier() and one.islower())) or None
    )
    if worst["type"] == "json_invalid":
        said = str(worst.get("ctx", {}).get("error", "")) or "check its quotes and commas"
        return Refused("invalid", "the body is no JSON", hint=said)
    if worst["type"] == "unknown_parameter":
        name = str(worst["ctx"]["param"])[:100]
        return Refused("invalid", worst["msg"], hint=_SCHEMA, param=f"{param}.{name}" if param else name)
    message = worst["msg"].removeprefix("Value error, ")
    hidden = worst["type"] == "missing" or isinstance(worst.get("input"), (dict, list))
    found = "" if hidden else f" (found {shown(worst.get('input'))})"
    return Refused("invalid", message + found, hint=_SCHEMA, param=param)


def honoured(body: Body, refused: Mapping[str, Sequence[Any]], why: str) -> None:
    """Raises Refused for fields that have a meaning elsewhere and none here.

    `refused` maps such a field to the values that change nothing, with which clients send it anyway.
    """
    for field, harmless in refused.items():
        value = getattr(body, field)
        if value is not None and value not in harmless:
            raise Refused("invalid", f"{shown(value)} is not supported {why}", hint="leave it out", param=field)
