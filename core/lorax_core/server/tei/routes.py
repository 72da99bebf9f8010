"""The routes of text-embeddings-inference.

Decides which there are, and how their bodies become requests. Knows nothing of heads or pooling.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic_core import to_json

from lorax_core.errors import RequestError
from lorax_core.server.errors import Refused
from lorax_core.server.gateway import Gateway
from lorax_core.server.rerank import best_first
from lorax_core.server.tei.about import model_kind, served
from lorax_core.server.tei.shapes import (
    DecodeBody,
    EmbedAllBody,
    EmbedBody,
    Inputs,
    PredictBody,
    PredictInputs,
    Prediction,
    Rank,
    RankBody,
    Rows,
    SimilarityBody,
    SimilarityParameters,
    TeiInfo,
    TeiToken,
    TokenizeTexts,
    answers,
)
from lorax_core.server.tokens import TextToken, detokenized, tokenized
from lorax_core.serving.prepare import Result
from lorax_core.serving.requests import ClassifyRequest, EmbedRequest, RerankRequest
from lorax_core.serving.requests import Request as EngineRequest
from lorax_core.types import Classification, Embedding

_Route = TypeVar("_Route", bound=Callable[..., Any])


def tei_routes(gateway: Gateway) -> APIRouter:
    """The routes of one server."""
    routes = APIRouter(prefix="/tei", tags=["tei"])
    kind = model_kind(gateway.engine.info())
    for each in (_embedding, _scoring):
        each(routes, gateway, kind)
    for one in (_comparing, _about, _tokens):
        one(routes, gateway)
    return routes


def _post(routes: APIRouter, path: str, answer: Any, *, bare: bool = False) -> Callable[[_Route], _Route]:
    """A route, which is also the one without a name when this is what the base was trained for: TEI has it so."""

    def add(route: _Route) -> _Route:
        # `InferenceClient` asks the address that it was given, which may end with a slash.
        for each in ("", "/") if bare else ():
            said = f"What the base was trained for: here {path}."
            routes.post(each, include_in_schema=not each, description=said, **answers(answer))(route)
        routes.post(path, **answers(answer))(route)
        return route

    return add


def _embedding(routes: APIRouter, gateway: Gateway, kind: str | None) -> None:
    @_post(routes, "/embed", list[list[float]], bare=kind in ("embedding", None))
    async def embed(http: Request, body: EmbedBody) -> Response:
        """A vector of each text."""
        options = {"normalize": body.normalize, "prompt_name": body.prompt_name, "dimensions": body.dimensions}
        return await _embed(gateway, http, body, options)

    @_post(routes, "/embed_all", list[list[list[float]]])
    async def embed_all(http: Request, body: EmbedAllBody) -> Response:
        """A vector of each token of each text."""
        return await _embed(
            gateway, http, body, {"pooling": "none", "normalize": False, "prompt_name": body.prompt_name}
        )

    @routes.post("/embed_sparse", include_in_schema=False)
    async def embed_sparse() -> None:
        raise Refused(
            "no_route", "this model gives no sparse vectors", hint="POST /tei/embed gives a dense one of each text"
        )


async def _embed(gateway: Gateway, http: Request, body: EmbedBody | EmbedAllBody, options: dict[str, Any]) -> Response:
    start = time.monotonic()
    inputs = _several(body.inputs)
    gateway.check_batch(len(inputs), param="inputs")
    options["adapter"] = gateway.names.adapter(body.model)
    results, queued = await gateway.timed(
        http, [EmbedRequest(input=one, truncate=body.cut, **options) for one in inputs]
    )
    vectors = [cast("Embedding", one).vector for one in results]
    # Numbers are long as text: many of them are written beside the event loop.
    return Response(
        await gateway.in_thread(_written, vectors),
        headers=_headers(start, queued, inputs, results),
        media_type="application/json",
    )


def _written(vectors: Sequence[np.ndarray[Any, Any]]) -> bytes:
    return to_json([vector.tolist() for vector in vectors])


def _several(inputs: Inputs | Rows) -> list[Any]:
    """What a request has: one text, one list of token ids, or a list of these."""
    if isinstance(inputs, str) or isinstance(inputs[0], int):
        return [inputs]
    return list(inputs)


def _comparing(routes: APIRouter, gateway: Gateway) -> None:
    @_post(routes, "/similarity", list[float])
    async def similarity(http: Request, body: SimilarityBody) -> Response:
        """The cosine of the angle between a sentence and each of the others."""
        start, asked = time.monotonic(), body.parameters or SimilarityParameters()
        texts = [body.inputs.source_sentence, *body.inputs.sentences]
        gateway.check_batch(len(body.inputs.sentences), param="inputs.sentences")
        adapter = gateway.names.adapter(body.model)
        results, queued = await gateway.timed(
            http,
            [
                EmbedRequest(
                    input=text, adapter=adapter, truncate=asked.cut, normalize=True, prompt_name=asked.prompt_name
                )
                for text in texts
            ],
        )
        first, *others = (cast("Embedding", one).vector for one in results)
        return JSONResponse([float(one @ first) for one in others], headers=_headers(start, queued, texts, results))


def _scoring(routes: APIRouter, gateway: Gateway, kind: str | None) -> None:
    @_post(routes, "/predict", list[Prediction] | list[list[Prediction]], bare=kind == "classifier")
    async def predict(http: Request, body: PredictBody) -> Response:
        """The labels of each text or pair, by falling score."""
        start = time.monotonic()
        inputs, single = _predicted(body.inputs)
        gateway.check_batch(len(inputs), param="inputs")
        adapter = gateway.names.adapter(body.model)
        requests: list[EngineRequest] = [
            ClassifyRequest(input=one, adapter=adapter, truncate=body.cut, raw_scores=body.raw_scores) for one in inputs
        ]
        results, queued = await gateway.timed(http, requests)
        found = [_predictions(cast("Classification", one)) for one in results]
        return JSONResponse(found[0] if single else found, headers=_headers(start, queued, inputs, results))

    @_post(routes, "/rerank", list[Rank], bare=kind == "reranker")
    async def rerank(http: Request, body: RankBody) -> Response:
        """The texts by how well they answer the query, the best first."""
        start = time.monotonic()
        gateway.check_batch(len(body.texts), param="texts")
        adapter, normalize = gateway.names.adapter(body.model), not body.raw_scores
        requests: list[EngineRequest] = [
            RerankRequest(query=body.query, document=text, adapter=adapter, truncate=body.cut, normalize=normalize)
            for text in body.texts
        ]
        results, queued = await gateway.timed(http, requests)
        ranks: list[dict[str, Any]] = [
            {"index": at, "score": score} | ({"text": body.texts[at]} if body.return_text else {})
            for at, score in best_first(results)
        ]
        return JSONResponse(ranks, headers=_headers(start, queued, [body.query, *body.texts], results))


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


def _headers(start: float, queued: float, inputs: Sequence[Any], results: Sequence[Result]) -> dict[str, str]:
    """What TEI says of an answer beside it: its cost, and the milliseconds that it took."""
    took = time.monotonic() - start
    texts = [part for one in inputs for part in (one if isinstance(one, tuple) else (one,)) if isinstance(part, str)]
    return {
        "x-compute-time": _milliseconds(took),
        "x-total-time": _milliseconds(took),
        "x-queue-time": _milliseconds(queued),
        "x-inference-time": _milliseconds(took - queued),
        "x-compute-characters": str(sum(map(len, texts))),
        "x-compute-tokens": str(sum(one.usage.prompt_tokens for one in results)),
    }


def _milliseconds(seconds: float) -> str:
    return str(int(max(seconds, 0.0) * 1000))


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


def _tokens(routes: APIRouter, gateway: Gateway) -> None:
    @routes.post("/tokenize", **answers(list[list[TeiToken]]))
    async def tokenize(body: TokenizeTexts) -> Response:
        """Each text as tokens."""
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        gateway.check_batch(len(texts), param="inputs")
        adapter = gateway.names.adapter(body.model)
        found = await tokenized(gateway, texts, special=body.add_special_tokens, adapter=adapter)
        return JSONResponse([_token_list(text, tokens) for text, tokens in zip(texts, found, strict=True)])

    @routes.post("/decode", **answers(list[str]))
    async def decode(body: DecodeBody) -> Response:
        """The text of each list of token ids."""
        rows = cast("list[list[int]]", _several(body.ids))
        gateway.check_batch(len(rows), param="ids")
        return JSONResponse(await detokenized(gateway, rows, gateway.names.adapter(body.model)))


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
