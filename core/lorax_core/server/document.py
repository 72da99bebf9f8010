"""What `/openapi.json` says where FastAPI would say something else.

Decides of which kind failures and events are in the document, and which keys open a route. Knows nothing of what routes do.
"""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI

from lorax_core.server.auth import OPEN, is_admin

_EVENT: Final = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_STREAM: Final = "text/event-stream"


_SCHEMES: Final = {
    "apiKey": {"type": "http", "scheme": "bearer", "description": "One of the server's API keys, where it has some."},
    "adminKey": {"type": "http", "scheme": "bearer", "description": "The server's admin key, which opens all routes."},
}


def correct_document(app: FastAPI, *, needs_key: bool) -> None:
    """Correct the document of an application, whatever routes it still gets; `needs_key` where it has API keys."""
    made = app.openapi

    def corrected() -> dict[str, Any]:
        document = made()
        document.setdefault("components", {})["securitySchemes"] = _SCHEMES
        for name, path in document["paths"].items():
            for operation in path.values():
                operation["security"] = _security(name, needs_key)
                for status, response in operation["responses"].items():
                    _correct(status, response)
        return document

    app.openapi = corrected  # type: ignore[method-assign]  # FastAPI's documented way


def _security(path: str, needs_key: bool) -> list[dict[str, list[str]]]:
    """Which keys open a route: one of these, of which the empty one is none."""
    if is_admin(path):
        return [{"adminKey": []}]
    keys: list[dict[str, list[str]]] = [{"apiKey": []}, {"adminKey": []}]
    return [] if path in OPEN else keys if needs_key else [{}, *keys]


def _correct(status: str, response: dict[str, Any]) -> None:
    content = response.get("content", {})
    if status.startswith(("4", "5")) and content:
        # FastAPI gives them the kind of the route's own answer, a stream for instance.
        response["content"] = {"application/json": next(iter(content.values()))}
    elif _STREAM in content:
        # Of one event, not of the stream: that is how tools read it.
        content[_STREAM]["schema"] = _EVENT | {
            name: value for name, value in content[_STREAM].get("schema", {}).items() if name == "description"
        }
