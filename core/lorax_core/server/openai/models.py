"""`/v1/models`: what a request may name.

Decides how the base and its adapters are listed. Knows nothing of what they are used for.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from lorax_core.server.errors import Refused
from lorax_core.server.gateway import Gateway
from lorax_core.server.openai.shapes import ModelCard, ModelList, answers


def model_routes(gateway: Gateway) -> APIRouter:
    """The routes of one server."""
    routes = APIRouter(tags=["openai"])
    names, created = gateway.names, int(time.time())

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "lorax",
            "root": name,
            "parent": None if name == names.base else names.base,
            "max_model_len": gateway.engine.info().max_tokens,
        }

    @routes.get("/v1/models", responses=answers(ModelList))
    async def list_models() -> Response:
        """The base, and the adapters that are loaded."""
        return JSONResponse({"object": "list", "data": [card(name) for name in names.all()]})

    # The path of an adapter's name may have slashes.
    @routes.get("/v1/models/{model:path}", responses=answers(ModelCard))
    async def retrieve_model(model: str) -> Response:
        """One of them, by its name or as base:adapter."""
        known = names.all()
        found = model if model in known else names.adapter(model) or names.base
        if found not in known:  # a source that a request may name, and that none has named yet
            raise Refused(
                "no_model", f"{model!r:.200} is not loaded", hint="GET /v1/models lists what is", param="model"
            )
        return JSONResponse(card(found))

    return routes
