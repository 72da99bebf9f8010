"""The page at `GET /`, one file in which nothing comes from elsewhere, and the numbers that it asks for, `GET /stats`.

Decides what a browser lets the page do. Knows nothing of tasks: the page asks the routes that all clients ask.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Final

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, JSONResponse, Response

from lorax_core.server.gateway import Gateway
from lorax_core.server.openai.shapes import answers
from lorax_core.server.page.stats import ServerState, state

_FOLDER: Final = files(__package__)
_INLINED: Final = {"style-src": "style.css", "script-src": "script.js"}


def page_routes(gateway: Gateway) -> APIRouter:
    """The routes of one server: the numbers, and the page unless it is switched off."""
    routes = APIRouter(tags=["page"])
    if gateway.options.page:
        text, policy = whole_page()
        headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
        }

        @routes.head("/", include_in_schema=False)
        @routes.get("/", include_in_schema=False)
        async def page() -> HTMLResponse:
            """A page to try the server in a browser."""
            return HTMLResponse(text, headers=headers)

    @routes.get("/stats", responses=answers(ServerState))
    async def stats() -> Response:
        """What the server is, can and does now."""
        return JSONResponse(state(gateway))

    return routes


def whole_page() -> tuple[str, str]:
    """The page with its style and script in it, and the policy under which a browser takes these two alone."""
    text = _FOLDER.joinpath("index.html").read_text(encoding="utf-8")
    allowed = {"default-src": "'none'", "connect-src": "'self'", "img-src": "data:"}
    for kind, name in _INLINED.items():
        inlined = _FOLDER.joinpath(name).read_text(encoding="utf-8")
        text = text.replace(f"/* {name} */", inlined)
        allowed[kind] = f"'sha256-{base64.b64encode(hashlib.sha256(inlined.encode()).digest()).decode()}'"
    allowed |= dict.fromkeys(("base-uri", "form-action", "frame-ancestors"), "'none'")
    return text, "; ".join(f"{kind} {source}" for kind, source in allowed.items())
