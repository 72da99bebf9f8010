"""The routes of LoRAX.

Decides which there are, and how bodies and answers go through the gateway. Knows nothing of what parameters mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from lorax_core.errors import RequestError
from lorax_core.server.errors import Refused
from lorax_core.server.gateway import Gateway
from lorax_core.server.lorax.adapters import AdapterParameters, choose_adapter
from lorax_core.server.lorax.answers import Clock, events, failed, generated, headers, spans, times
from lorax_core.server.lorax.params import BEST_OF, Asked, GenerateBody, asked_of
from lorax_core.server.lorax.shapes import (
    EmbeddingAnswer,
    EntityAnswer,
    Generated,
    LoraxInfo,
    LoraxToken,
    StreamedToken,
    answers,
)
from lorax_core.server.schemas import StrictBody, unsupported
from lorax_core.server.sse import EventStream
from lorax_core.server.tokens import tokenized
from lorax_core.serving.requests import STOP_STRINGS, ClassifyRequest, EmbedRequest
from lorax_core.types import Classification, Completion, Embedding, Task
from lorax_core.version import __version__

_PIPELINES: Final = {
    Task.GENERATE: "text-generation",
    Task.TOKEN_CLASSIFICATION: "token-classification",
    Task.SEQUENCE_CLASSIFICATION: "text-classification",
    Task.EMBED: "feature-extraction",
}


class TextBody(StrictBody):
    """A text, and the adapter to read it with."""

    inputs: str = Field(min_length=1)
    parameters: AdapterParameters | None = None
    stream: Any = unsupported(False)


class TextsBody(StrictBody):
    """Texts, and the adapter to read them with."""

    inputs: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)
    parameters: AdapterParameters | None = None
    stream: Any = unsupported(False)


class TokenizeBody(StrictBody):
    """A text, and the adapter whose tokenizer reads it where it has one."""

    inputs: str
    parameters: AdapterParameters | None = None
    add_special_tokens: bool | None = Field(default=None, description="Those that the tokenizer adds; True by default.")


def lorax_routes(gateway: Gateway) -> APIRouter:
    """The routes of one server."""
    routes = APIRouter(tags=["lorax"])
    for each in (_generating, _reading, _about):
        each(routes, gateway)
    return routes


def _generating(routes: APIRouter, gateway: Gateway) -> None:
    @routes.post("/", **answers(list[Generated], StreamedToken))
    async def compatible(http: Request, body: GenerateBody) -> Response:
        """Continue a prompt; a list of one answer, or its tokens as they come."""
        if body.stream:
            return await _stream(gateway, http, body)
        return await _generate(gateway, http, body, as_list=True)

    @routes.post("/generate", **answers(Generated))
    async def generate(http: Request, body: GenerateBody) -> Response:
        """Continue a prompt."""
        if body.stream:
            raise Refused("invalid", "this route answers at once", hint="POST /generate_stream streams", param="stream")
        return await _generate(gateway, http, body)

    @routes.post("/generate_stream", **answers(None, StreamedToken))
    async def generate_stream(http: Request, body: GenerateBody) -> Response:
        """Continue a prompt; its tokens as they come."""
        return await _stream(gateway, http, body)


async def _generate(gateway: Gateway, http: Request, body: GenerateBody, *, as_list: bool = False) -> Response:
    clock = Clock.started()
    asked = asked_of(gateway, body, stream=False)
    clock.understood()
    results, queued = await gateway.timed(http, asked.requests)
    completions = cast("list[Completion]", results)
    # Tokens are made text again for details: with many, that takes long.
    make = gateway.in_thread if asked.parameters.with_details else _here
    answer = await make(generated, gateway.engine, asked, completions)
    return JSONResponse(
        [answer] if as_list else answer, headers={**headers(gateway, asked), **times(clock, queued, completions)}
    )


async def _here(job: Any, *args: Any) -> Any:
    return job(*args)


async def _stream(gateway: Gateway, http: Request, body: GenerateBody) -> Response:
    asked: Asked = asked_of(gateway, body, stream=True)
    coming = await gateway.events(http, asked.requests)
    answer = EventStream(coming, events(gateway, asked, coming), failed)
    answer.headers.update(headers(gateway, asked))
    return answer


def _reading(routes: APIRouter, gateway: Gateway) -> None:
    @routes.post("/embed", **answers(EmbeddingAnswer))
    async def embed(http: Request, body: TextBody) -> Response:
        """A vector of a text."""
        clock = Clock.started()
        adapter = choose_adapter(gateway, body.parameters or AdapterParameters())
        clock.understood()
        (found,), queued = await gateway.timed(http, [EmbedRequest(input=body.inputs, adapter=adapter)])
        vector = cast("Embedding", found).vector.tolist()
        return JSONResponse({"embeddings": vector}, headers=spans(clock, queued))

    @routes.post("/classify", **answers(list[EntityAnswer]))
    async def classify(http: Request, body: TextBody) -> Response:
        """The entities in a text."""
        found, headers = await _entities(gateway, http, body, [body.inputs])
        return JSONResponse(found[0], headers=headers)

    @routes.post("/classify_batch", **answers(list[list[EntityAnswer]]))
    async def classify_batch(http: Request, body: TextsBody) -> Response:
        """The entities in each of several texts."""
        found, headers = await _entities(gateway, http, body, body.inputs)
        return JSONResponse(found, headers=headers)


async def _entities(
    gateway: Gateway, http: Request, body: TextBody | TextsBody, texts: Sequence[str]
) -> tuple[list[list[dict[str, Any]]], dict[str, str]]:
    """The entities of each text, and the times of all."""
    clock = Clock.started()
    gateway.check_batch(len(texts), param="inputs")
    adapter = choose_adapter(gateway, body.parameters or AdapterParameters())
    clock.understood()
    found, queued = await gateway.timed(http, [ClassifyRequest(input=text, adapter=adapter) for text in texts])
    pairs = zip(texts, found, strict=True)
    return [_entity_list(text, cast("Classification", one)) for text, one in pairs], spans(clock, queued)


def _entity_list(text: str, found: Classification) -> list[dict[str, Any]]:
    """Entities; of labels that are not B-/I- ones, an entry for each token."""
    if found.entities is not None:
        return [
            {"entity_group": one.label, "score": one.score, "word": one.text, "start": one.start, "end": one.end}
            for one in found.entities
        ]
    if found.offsets is None:
        raise RequestError(
            "this model labels texts as a whole, and this route gives parts of them",
            hint="POST /tei/predict gives labels of whole texts",
        )
    return [
        {"entity_group": label, "score": score, "word": text[start:end], "start": start, "end": end}
        for label, score, (start, end) in zip(found.labels, found.scores, found.offsets, strict=True)
    ]


def _about(routes: APIRouter, gateway: Gateway) -> None:
    @routes.get("/info", **answers(LoraxInfo))
    async def info() -> Response:
        """What is served."""
        return JSONResponse(_info(gateway))

    @routes.post("/tokenize", **answers(list[LoraxToken]))
    async def tokenize(body: TokenizeBody) -> Response:
        """A text as tokens."""
        adapter = choose_adapter(gateway, body.parameters or AdapterParameters())
        special = body.add_special_tokens is not False
        (found,) = await tokenized(gateway, [body.inputs], special=special, adapter=adapter)
        return JSONResponse([{"id": one.id, "text": one.token, "start": one.start, "stop": one.stop} for one in found])


def _info(gateway: Gateway) -> dict[str, Any]:
    engine = gateway.engine
    about, options = engine.info(), engine.options
    return {
        "model_id": gateway.names.base,
        "model_sha": options.revision,
        "model_dtype": f"torch.{about.dtype}",
        "model_device_type": about.device.split(":")[0],
        "model_pipeline_tag": next((tag for task, tag in _PIPELINES.items() if task.value in about.tasks), None),
        "max_concurrent_requests": options.max_batch_rows + gateway.options.max_queue,
        "max_best_of": BEST_OF,
        "max_stop_sequences": STOP_STRINGS,
        "max_input_length": about.max_tokens - 1 if Task.GENERATE.value in about.tasks else about.max_text_tokens,
        "max_total_tokens": about.max_tokens,
        "waiting_served_ratio": 0.0,
        "max_batch_total_tokens": about.kv_cache_tokens or options.max_batch_tokens,
        "max_waiting_tokens": 0,
        "validation_workers": 0,
        "version": __version__,
        "sha": None,
        "docker_label": None,
        "request_logger_url": None,
        "eager_prefill": False,
    }
