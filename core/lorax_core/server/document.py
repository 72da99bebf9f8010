"""What `/openapi.json` says where FastAPI would say something else.

Decides of which kind failures and events are in the document. Knows nothing of what routes do.
"""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI

_EVENT: Final = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_STREAM: Final = "text/event-stream"


def correct_document(app: FastAPI) -> None:
    """Correct the document of an application, whatever routes it still gets."""
    made = app.openapi

    def corrected() -> dict[str, Any]:
        document = made()
        for path in document["paths"].values():
            for operation in path.values():
                for status, response in operation["responses"].items():
                    _correct(status, response)
        return document

    app.openapi = corrected  # type: ignore[method-assign]  # FastAPI's documented way


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
