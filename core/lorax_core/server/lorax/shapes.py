"""What LoRAX's API answers, as `/openapi.json` describes it.

Decides the shapes alone: answers are built as plain dicts, which costs less, and tests hold them to these models.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from fastapi import Response
from pydantic import BaseModel

from lorax_core.server.schemas import AnswerShape, failures

Finish = Literal["length", "eos_token", "stop_sequence"]


class LoraxFailure(AnswerShape):
    """The answer to a request that failed; `hint` says what to do next."""

    error: str
    error_type: str
    hint: str | None = None


class InputToken(AnswerShape):
    """A token of the prompt; nothing predicts the first one."""

    id: int
    text: str
    logprob: float | None


class AlternativeToken(AnswerShape):
    """A token that may have come."""

    id: int
    text: str
    logprob: float


class GeneratedToken(AnswerShape):
    """A token of the answer. The texts of those that are not special are the generated text."""

    id: int
    text: str
    logprob: float
    special: bool
    alternative_tokens: list[AlternativeToken] | None = None


class BestOfSequence(AnswerShape):
    """An answer that another one was better than."""

    generated_text: str
    finish_reason: Finish
    generated_tokens: int
    seed: int | None
    prefill: list[InputToken]
    tokens: list[GeneratedToken]


class StreamDetails(AnswerShape):
    """How an answer came about. `seed` samples the same answer again; None where none was sampled."""

    finish_reason: Finish
    prompt_tokens: int
    generated_tokens: int
    seed: int | None


class Details(StreamDetails):
    """The same, with all tokens; `prefill` has those of the prompt where `decoder_input_details` asked for them."""

    prefill: list[InputToken]
    tokens: list[GeneratedToken]
    best_of_sequences: list[BestOfSequence] | None = None


class Generated(AnswerShape):
    """The answer to a prompt."""

    generated_text: str
    details: Details | None = None


class StreamedToken(AnswerShape):
    """One event of a stream; the last one has the text."""

    token: GeneratedToken
    generated_text: str | None
    details: StreamDetails | None


class EmbeddingAnswer(AnswerShape):
    """A vector."""

    embeddings: list[float]


class EntityAnswer(AnswerShape):
    """A part of the text, from character `start` to `end`, and what it is."""

    entity_group: str
    score: float
    word: str
    start: int
    end: int


class LoraxToken(AnswerShape):
    """A token of a text, and the characters that it covers."""

    id: int
    text: str
    start: int
    stop: int


class LoraxInfo(AnswerShape):
    """What is served. Of the numbers of LoRAX's own scheduler, those without a meaning here are 0."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int
    max_total_tokens: int
    waiting_served_ratio: float
    max_batch_total_tokens: int
    max_waiting_tokens: int
    validation_workers: int
    version: str
    sha: str | None
    docker_label: str | None
    request_logger_url: str | None
    eager_prefill: bool


FAILURES: Final[dict[int | str, dict[str, Any]]] = failures(LoraxFailure, lambda kind: kind.lorax_status)
"""The `responses` of a route beside its answer."""


def answers(shape: Any, streamed: type[BaseModel] | None = None) -> dict[str, Any]:
    """Options of a route that answers `shape`, or a stream of `streamed` where a request asks for one."""
    responses: dict[int | str, dict[str, Any]] = {**FAILURES}
    if streamed is not None:
        data = {"type": "string", "description": f"a {streamed.__name__} as JSON: {_fields(streamed)}"}
        event = {"type": "object", "required": ["data"], "properties": {"data": data}}
        responses[200] = {"description": "The answer.", "content": {"text/event-stream": {"schema": event}}}
    # Of an answer without a model FastAPI would say that it is JSON.
    return {"response_model": shape, "responses": responses} | ({"response_class": Response} if shape is None else {})


def _fields(shape: type[BaseModel]) -> str:
    return ", ".join(shape.model_fields)
