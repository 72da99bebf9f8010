"""All routes of OpenAI's API.

Decides which there are. Knows nothing of what they do.
"""

from __future__ import annotations

from fastapi import APIRouter

from lorax_core.server.gateway import Gateway
from lorax_core.server.openai.chat import chat_routes
from lorax_core.server.openai.completions import completion_routes
from lorax_core.server.openai.embeddings import embedding_routes
from lorax_core.server.openai.models import model_routes


def openai_routes(gateway: Gateway) -> APIRouter:
    """The routes of one server."""
    routes = APIRouter()
    for each in (model_routes, chat_routes, completion_routes, embedding_routes):
        routes.include_router(each(gateway))
    return routes
