"""The routes of text-embeddings-inference.

Decides which there are, and how their bodies become requests. Knows nothing of heads or pooling.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic_core import to_json

from lorax_core.errors import RequestError
from lorax_core.server.gateway import Gateway
from lorax_core.server.rerank import best_first
from lorax_core.server.tei.about import served
from lorax_core.server.tei.shapes import (
    EmbedAllBody,
    EmbedBody,
    Inputs,
    PredictBody,
    PredictInputs,
    Prediction,
    Rank,
    RankBody,
    TeiInfo,
    TeiToken,
    TokenizeTexts,
    answers,
)
from lorax_core.server.tokens import TextToken, tokenized
from lorax_core.serving.prepare import Result
from lorax_core.serving.requests import ClassifyRequest, EmbedRequest, RerankRequest
from lorax_core.serving.requests import Request as EngineRequest
from lorax_core.types import Classification, Embedding


def tei_routes(gateway: Gateway) -> APIRouter:
    """The routes of one server."""
    routes = APIRouter(prefix="/tei", tags=["tei"])
    for each in (_embedding, _scoring, _about):
        each(routes, gateway)
    return routes


def _embedding(routes: APIRouter, gateway: Gateway) -> None:
    @routes.post("/embed", **answers(list[list[float]]))
    async def embed(http: Request, body: EmbedBody) -> Response:
        """A vector of each text."""
        options = {"normalize": body.normalize, "prompt_name": body.prompt_name, "dimensions": body.dimensions}
        return await _embed(gateway, http, body, options)

    @routes.post("/embed_all", **answers(list[list[list[float]]]))
    async def embed_all(http: Request, body: EmbedAllBody) -> Response:
        """A vector of each token of each text."""
        return await _embed(
            gateway, http, body, {"pooling": "none", "normalize": False, "prompt_name": body.prompt_name}
        )


async def _embed(gateway: Gateway, http: Request, body: EmbedBody | EmbedAllBody, options: dict[str, Any]) -> Response:
    start = time.monotonic()
    inputs = _several(body.inputs)
    gateway.check_batch(len(inputs), param="inputs")
    options["adapter"] = gateway.names.adapter(body.model)
    results = await gateway.answer(http, [EmbedRequest(input=one, truncate=body.cut, **options) for one in inputs])
    vectors = [cast("Embedding", one).vector for one in results]
    # Numbers are long as text: many of them are written beside the event loop.
    return Response(
        await gateway.in_thread(_written, vectors),
        headers=_headers(start, inputs, results),
        media_type="application/json",
    )


def _written(vectors: Sequence[np.ndarray[Any, Any]]) -> bytes:
    return to_json([vector.tolist() for vector in vectors])


def _several(inputs: Inputs) -> list[Any]:
    """The inputs of a request for vectors: one text, one list of token ids, or a list of these."""
    if isinstance(inputs, str) or isinstance(inputs[0], int):
        return [inputs]
    return list(inputs)


def _scoring(routes: APIRouter, gateway: Gateway) -> None:
    @routes.post("/predict", **answers(list[Prediction] | list[list[Prediction]]))
    async def predict(http: Request, body: PredictBody) -> Response:
        """The labels of each text or pair, by falling score."""
        start = time.monotonic()
        inputs, single = _predicted(body.inputs)
        gateway.check_batch(len(inputs), param="inputs")
        adapter = gateway.names.adapter(body.model)
        requests: list[EngineRequest] = [
            ClassifyRequest(input=one, adapter=adapter, truncate=body.cut, raw_scores=body.raw_scores) for one in inputs
        ]
        results = await gateway.answer(http, requests)
        found = [_predictions(cast("Classification", one)) for one in results]
        return JSONResponse(found[0] if single else found, headers=_headers(start, inputs, results))

    @routes.post("/rerank", **answers(list[Rank]))
    async def rerank(http: Request, body: RankBody) -> Response:
        """The texts by how well they answer the query, the best first."""
        start = time.monotonic()
        gateway.check_batch(len(body.texts), param="texts")
        adapter, normalize = gateway.names.adapter(body.model), not body.raw_scores
        requests: list[EngineRequest] = [
            RerankRequest(query=body.query, document=text, adapter=adapter, truncate=body.cut, normalize=normalize)
            for text in body.texts
        ]
        results = await gateway.answer(http, requests)
        ranks: list[dict[str, Any]] = [
            {"index": at, "score": score} | ({"text": body.texts[at]} if body.return_text else {})
            for at, score in best_first(results)
        ]
        return JSONResponse(ranks, headers=_headers(start, [body.query, *body.texts], results))


def _predicted(inputs: PredictInputs) -> tuple[list[Any], bool]:
    """What is classified, and whether it is one text or pair and no list of them."""
    if isinstance(inputs, str):
        return [inputs], True
    if isinstance(inputs[0], str):
        return [_one(inputs)], True
    return [_one(one) for one in inputs], False


def _one(parts: Sequence[str]) -> str | tuple[str, str]:
    return (parts[0], parts[1]) if len(parts) == 2 else parts[0]


def _predictions(found: Classification) -> list[dict[str, Any]]:
    if found.tokens is not None or found.offsets is not None:
        raise RequestError(
            "this model labels tokens, and this route gives labels of whole texts",
            hint="POST /classify gives the entities in a text",
        )
    return [{"score": score, "label": label} for label, score in zip(found.labels, found.scores, strict=True)]


def _headers(start: float, inputs: Sequence[Any], results: Sequence[Result]) -> dict[str, str]:
    """What TEI says of an answer beside it: its cost, and the milliseconds that it took."""
    took = str(int((time.monotonic() - start) * 1000))
    texts = [part for one in inputs for part in (one if isinstance(one, tuple) else (one,)) if isinstance(part, str)]
    return {
        "x-compute-time": took,
        "x-total-time": took,
        "x-compute-characters": str(sum(map(len, texts))),
        "x-compute-tokens": str(sum(one.usage.prompt_tokens for one in results)),
    }


def _about(routes: APIRouter, gateway: Gateway) -> None:
    @routes.get("/info", **answers(TeiInfo))
    async def info() -> Response:
        """What is served."""
        return JSONResponse(served(gateway))

    @routes.get("/health", **answers(None))
    async def health() -> Response:
        """200 while the engine lives."""
        alive = not gateway.engine.closed
        closed = {"error": "the engine is closed; only a restart helps", "error_type": "Unhealthy"}
        return Response(status_code=200) if alive else JSONResponse(closed, 503)

    @routes.post("/tokenize", **answers(list[list[TeiToken]]))
    async def tokenize(body: TokenizeTexts) -> Response:
        """Each text as tokens."""
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        gateway.check_batch(len(texts), param="inputs")
        found = await tokenized(gateway, texts, special=body.add_special_tokens)
        return JSONResponse([_token_list(text, tokens) for text, tokens in zip(texts, found, strict=True)])


def _token_list(text: str, tokens: Sequence[TextToken]) -> list[dict[str, Any]]:
    return [
        {
            "id": one.id,
            "text": one.token if one.special else text[one.start : one.stop],
            "special": one.special,
            "start": None if one.special else one.start,
            "stop": None if one.special else one.stop,
        }
        for one in tokens
    ]
