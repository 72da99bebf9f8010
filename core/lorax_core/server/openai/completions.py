"""`/v1/completions`.

Decides how texts are continued in OpenAI's older form: several prompts at once, `echo`, log-probabilities as parallel lists.
Knows nothing of chats.
"""

from __future__ import annotations

import codecs
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ConfigDict, Field

from lorax_core.server.errors import Refused
from lorax_core.server.gateway import Events, Gateway
from lorax_core.server.openai.answers import (
    AnswerHeads,
    Chunks,
    TokenTexts,
    failed,
    number,
    shown_logprobs,
    spelt,
    stream_usage,
    usage,
)
from lorax_core.server.openai.params import GenerationBody, generate_request
from lorax_core.server.openai.prompts import PromptInput, prompts
from lorax_core.server.openai.shapes import TextCompletion, answers
from lorax_core.server.schemas import unsupported
from lorax_core.server.sse import EventStream
from lorax_core.serving.engine import Engine
from lorax_core.serving.requests import GenerateRequest
from lorax_core.types import Completion, TokenLogprobs

_TOKENS = 16
"""OpenAI's default for `max_tokens`."""


class CompletionBody(GenerationBody):
    """A text to continue, or several."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "Once", "max_tokens": 8, "temperature": 0, "logprobs": 1}]}
    )

    prompt: PromptInput
    best_of: int | None = Field(default=None, ge=1, le=128, description="Refused unless equal to n.")
    echo: bool | None = Field(default=None, description="Give the prompt before its continuation.")
    logprobs: int | None = Field(default=None, ge=0, le=100)
    suffix: Any = unsupported("")
    add_special_tokens: Any = unsupported(True)

    def check(self) -> None:
        """Raises Refused for what does not fit together."""
        super().check()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise Refused(
                "invalid", f"best_of {self.best_of} and n {self.n or 1}: all answers are given, so both are the same",
                hint="leave it out, and choose among n answers by their logprobs", param="best_of",
            )  # fmt: skip
        if self.max_tokens == 0 and not self.echo:
            raise Refused("invalid", "0 is for echo alone", hint="ask for at least 1", param="max_tokens")
        if self.echo and self.stream and self.logprobs is not None:
            raise Refused(
                "invalid", "echo with logprobs does not come in streams", hint="ask without stream", param="logprobs"
            )


@dataclass
class _Line:
    """One choice on its way: where its text has come to, and bytes of a character that is not whole."""

    at: int = 0
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def offset(self, raw: bytes) -> int:
        """Where the text of the next token begins."""
        start = self.at
        self.at += len(self.decoder.decode(raw))
        return start


def completion_routes(gateway: Gateway) -> APIRouter:
    """The routes of one server."""
    routes = APIRouter(tags=["openai"])
    texts, heads = TokenTexts(gateway.engine), AnswerHeads(gateway)

    @routes.post("/v1/completions", responses=answers(TextCompletion, TextCompletion))
    async def create_completion(http: Request, body: CompletionBody) -> Response:
        """Continue texts, whole or as a stream."""
        body.check()
        given = prompts(body.prompt, "prompt")
        gateway.check_batch(len(given) * (body.n or 1), param="prompt")
        requests = _requests(gateway, body, given)
        start = heads.new("text_completion", "cmpl", body.model)
        if body.stream:
            events = await gateway.events(http, requests)
            chunks = Chunks(start, include_usage=body.include_usage)
            lines = _lines(body, requests, events, chunks, texts, gateway.engine)
            return EventStream(events, lines, failed)
        results = [cast("Completion", result) for result in await gateway.answer(http, requests)]
        if body.logprobs is None and body.prompt_logprobs is None:
            choices = _choices(body, requests, results, texts, gateway.engine)
        else:
            choices = await gateway.in_thread(_choices, body, requests, results, texts, gateway.engine)
        return JSONResponse({**start, "choices": choices, "usage": usage(results, shown=body.max_tokens != 0)})

    return routes


def _requests(gateway: Gateway, body: CompletionBody, given: Sequence[str | list[int]]) -> list[GenerateRequest]:
    options = body.options(gateway.options)
    options["max_tokens"] = max(_TOKENS if body.max_tokens is None else body.max_tokens, 1)
    if body.logprobs is not None:
        options["logprobs"] = body.logprobs
        if body.echo:
            options["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    adapter = gateway.names.adapter(body.model)
    return [generate_request(body, prompt=prompt, adapter=adapter, **options) for prompt in given]


def _choices(
    body: CompletionBody,
    requests: Sequence[GenerateRequest],
    results: Sequence[Completion],
    texts: TokenTexts,
    engine: Engine,
) -> list[dict[str, Any]]:
    """The choices of a whole answer, those of the first prompt first."""
    choices: list[dict[str, Any]] = []
    for request, result in zip(requests, results, strict=True):
        echoed = _text(request, engine) if body.echo else ""
        for one in (result, *result.alternatives):
            logprobs = None
            if body.logprobs is not None:
                line, logprobs = _Line(), _empty()
                if body.echo:
                    _add_prompt(logprobs, line, request, result.prompt_logprobs or [], body.logprobs, texts, engine)
                if body.max_tokens != 0:
                    _add(logprobs, line, shown_logprobs(one, one.logprobs or []), texts, engine)
            choices.append(
                {
                    "index": len(choices),
                    "text": echoed + (one.text if body.max_tokens != 0 else ""),
                    "logprobs": logprobs,
                    "finish_reason": one.finish_reason.value if body.max_tokens != 0 else "length",
                    "stop_reason": one.stop_reason if body.max_tokens != 0 else None,
                }
                | (
                    {"prompt_logprobs": texts.prompt(result.prompt_logprobs)}
                    if body.prompt_logprobs is not None
                    else {}
                )
            )
    return choices


async def _lines(
    body: CompletionBody,
    requests: Sequence[GenerateRequest],
    events: Events,
    chunks: Chunks,
    texts: TokenTexts,
    engine: Engine,
) -> AsyncGenerator[bytes, None]:
    """The chunks of a stream."""
    each = body.n or 1
    ended: list[tuple[int, Completion]] = []
    lines = [_Line() for _ in range(len(requests) * each)]
    for index in range(len(lines) if body.echo else 0):
        text = _text(requests[index // each], engine)
        yield chunks.chunk(_piece(index, text))
    async for event in events:
        index = event.index * each + event.choice
        done = event.completion
        if done is not None:
            ended.append((event.choice, done))
        choice = _piece(index, event.text)
        if body.logprobs is not None:
            choice["logprobs"] = _empty()
            _add(choice["logprobs"], lines[index], shown_logprobs(done, event.logprobs), texts, engine)
        if body.max_tokens == 0:
            choice |= {"text": "", "finish_reason": "length" if done else None}
        elif done is not None:
            choice |= {"finish_reason": done.finish_reason.value, "stop_reason": done.stop_reason}
        # Tokens of a character that is not whole have no text yet.
        if choice["text"] or choice["logprobs"] or done is not None:
            yield chunks.chunk(choice)
    yield chunks.end(stream_usage(ended, shown=body.max_tokens != 0))


def _piece(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}


def _text(request: GenerateRequest, engine: Engine) -> str:
    prompt = cast("str | list[int]", request.prompt)
    return prompt if isinstance(prompt, str) else engine.detokenize(prompt, adapter=request.adapter)


def _empty() -> dict[str, Any]:
    return {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}


def _add(
    logprobs: dict[str, Any], line: _Line, scores: Sequence[TokenLogprobs], texts: TokenTexts, engine: Engine
) -> None:
    """Add tokens of an answer."""
    ids = [one.token_id for one in scores]
    # Special tokens are not in the text, so none of it is theirs.
    in_text = engine.token_bytes(ids, special=False)
    for one, raw, shown in zip(scores, in_text, texts.bytes(ids), strict=True):
        logprobs["tokens"].append(spelt(shown))
        logprobs["text_offset"].append(line.offset(raw))
        logprobs["token_logprobs"].append(number(one.logprob))
        logprobs["top_logprobs"].append(texts.ranked(one))


def _add_prompt(
    logprobs: dict[str, Any],
    line: _Line,
    request: GenerateRequest,
    scores: Sequence[TokenLogprobs | None],
    top: int,
    texts: TokenTexts,
    engine: Engine,
) -> None:
    """Add the tokens of a prompt; nothing predicts the first."""
    tokenized = engine.tokenize(cast("str | list[int]", request.prompt), adapter=request.adapter)
    ids = tokenized.ids
    for at, (one, raw, shown) in enumerate(
        zip(scores, engine.token_bytes(ids, special=False), texts.bytes(ids), strict=True)
    ):
        logprobs["tokens"].append(spelt(shown))
        start = line.offset(raw)
        logprobs["text_offset"].append(tokenized.offsets[at][0] if tokenized.offsets else start)
        logprobs["token_logprobs"].append(None if one is None else number(one.logprob))
        most_likely = None if one is None else TokenLogprobs(one.token_id, one.logprob, dict([*one.top.items()][:top]))
        logprobs["top_logprobs"].append(None if most_likely is None else texts.ranked(most_likely))
    line.at = len(_text(request, engine))
