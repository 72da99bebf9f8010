"""`/v1/embeddings`.

Decides how inputs of every shape become requests, and how vectors are written. Knows nothing of pooling.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, Literal, cast

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import ConfigDict, Field

from lorax_core.server.gateway import Gateway
from lorax_core.server.openai.params import MODEL
from lorax_core.server.openai.prompts import PromptInput, prompts
from lorax_core.server.openai.shapes import EmbeddingList, answers
from lorax_core.server.schemas import StrictBody, unsupported
from lorax_core.server.sse import encoded
from lorax_core.serving.requests import NAME_LENGTH, EmbedRequest
from lorax_core.types import Embedding

_INLINE: Final = 20_000
"""Numbers that are written in the event loop."""


class EmbeddingsBody(StrictBody):
    """What to embed: a text, token ids, or a list of either."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"input": ["a text", "another"]}, {"input": "a", "encoding_format": "base64"}]}
    )

    input: PromptInput
    model: str | None = Field(default=None, max_length=NAME_LENGTH, description=MODEL)
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(
        default=None, ge=1, lt=2**31, description="Keep the first so many numbers: for models that were trained for it."
    )
    normalize: bool | None = Field(default=None, description="Left out, as the checkpoint states it.")
    prompt_name: str | None = Field(
        default=None,
        max_length=NAME_LENGTH,
        description='A prompt of the checkpoint, such as "query", to go before each text.',
    )
    user: str | None = Field(default=None, description="Accepted, and changes nothing.")
    truncate_prompt_tokens: Any = unsupported()


def embedding_routes(gateway: Gateway) -> APIRouter:
    """The routes of one server."""
    routes = APIRouter(tags=["openai"])

    @routes.post("/v1/embeddings", responses=answers(EmbeddingList))
    async def create_embeddings(http: Request, body: EmbeddingsBody) -> Response:
        """A vector for each input."""
        inputs = prompts(body.input, "input")
        gateway.check_batch(len(inputs), param="input")
        adapter = gateway.names.adapter(body.model)
        requests = [
            EmbedRequest(
                input=one,
                adapter=adapter,
                dimensions=body.dimensions,
                normalize=body.normalize,
                prompt_name=body.prompt_name,
            )
            for one in inputs
        ]
        found = [cast("Embedding", result) for result in await gateway.answer(http, requests)]
        job = partial(_answer, found, body.encoding_format, body.model or gateway.names.base)
        # Millions of numbers take seconds to write.
        large = sum(one.vector.size for one in found) > _INLINE
        return Response(await gateway.in_thread(job) if large else job(), media_type="application/json")

    return routes


def _answer(found: Sequence[Embedding], form: str | None, model: str) -> bytes:
    """The body of the answer."""
    # Vector by vector, so that the event loop gets its turn between two.
    rows = [
        encoded({"object": "embedding", "index": at, "embedding": _written(one, form)}) for at, one in enumerate(found)
    ]
    tokens = sum(one.usage.prompt_tokens for one in found)
    rest = encoded({"model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
    return b'{"object":"list","data":[' + b",".join(rows) + b"]," + rest[1:]


def _written(found: Embedding, form: str | None) -> list[float] | str:
    """A vector as JSON has it."""
    if form == "base64":
        return base64.b64encode(np.ascontiguousarray(found.vector, "<f4").tobytes()).decode()
    numbers: list[float] = found.vector.tolist()
    return numbers
