"""`/v1/rerank`, as clients of Cohere, Jina and vLLM ask it.

Decides in which order documents come, and what of them. Knows nothing of scores.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Literal, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ConfigDict, Field

from lorax_core.server.gateway import Gateway
from lorax_core.server.schemas import AnswerShape, OpenAIError, StrictBody, failures, unsupported
from lorax_core.serving.prepare import Result
from lorax_core.serving.requests import NAME_LENGTH, RerankRequest
from lorax_core.types import Relevance


class Document(StrictBody):
    """A text."""

    text: str


class RerankBody(StrictBody):
    """A query, and documents that may answer it."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"query": "a question", "documents": ["one", {"text": "another"}], "top_n": 1}]}
    )

    model: str | None = Field(
        default=None, max_length=NAME_LENGTH, description="The base, an adapter, or base:adapter; the base by default."
    )
    query: str
    documents: list[str | Document] = Field(min_length=1)
    top_n: int | None = Field(default=None, ge=1, description="So many of the best; all by default.")
    return_documents: bool | None = Field(default=None, description="Also their texts; not by default.")
    truncate_prompt_tokens: Literal[-1] | None = Field(
        default=None, description="-1 cuts what the model cannot hold, at its end; else it is refused."
    )
    use_activation: bool | None = Field(default=None, description="False gives logits instead of their sigmoid.")
    max_tokens_per_doc: Any = unsupported()
    max_chunks_per_doc: Any = unsupported()
    rank_fields: Any = unsupported()


class DocumentText(AnswerShape):
    """The text of a document."""

    text: str


class RankedDocument(AnswerShape):
    """A document by its place among those given."""

    index: int
    relevance_score: float
    document: DocumentText | None = None


class RerankUsage(AnswerShape):
    """Tokens of all pairs of the query and a document."""

    prompt_tokens: int
    total_tokens: int


class Reranked(AnswerShape):
    """The documents, the best first."""

    id: str
    model: str
    results: list[RankedDocument]
    usage: RerankUsage


def best_first(results: Sequence[Result]) -> list[tuple[int, float]]:
    """The places and scores of documents, the best first and of equal ones the first."""
    scores = [cast("Relevance", one).score for one in results]
    return sorted(enumerate(scores), key=lambda one: -one[1])


def rerank_routes(gateway: Gateway) -> APIRouter:
    """The routes of one server."""
    routes = APIRouter(tags=["rerank"])
    described: dict[str, Any] = {
        "response_model": Reranked,
        "responses": failures(OpenAIError, lambda kind: kind.status),
    }

    # Under the names of Cohere's first and second API, and of vLLM's.
    @routes.post("/v1/rerank", **described)
    @routes.post("/v2/rerank", **described)
    @routes.post("/rerank", **described)
    async def rerank(http: Request, body: RerankBody) -> Response:
        """Documents by how well they answer a query."""
        return JSONResponse(await _ranked(gateway, http, body))

    return routes


async def _ranked(gateway: Gateway, http: Request, body: RerankBody) -> dict[str, Any]:
    gateway.check_batch(len(body.documents), param="documents")
    adapter = gateway.names.adapter(body.model)
    texts = [one if isinstance(one, str) else one.text for one in body.documents]
    results = await gateway.answer(
        http,
        [
            RerankRequest(
                query=body.query,
                document=text,
                adapter=adapter,
                truncate="error" if body.truncate_prompt_tokens is None else "end",
                normalize=body.use_activation is not False,
            )
            for text in texts
        ],
    )
    tokens = sum(one.usage.prompt_tokens for one in results)
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "model": body.model or gateway.names.base,
        "results": [
            {"index": at, "relevance_score": score}
            | ({"document": {"text": texts[at]}} if body.return_documents else {})
            for at, score in best_first(results)[: body.top_n]
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
