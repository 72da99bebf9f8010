"""`/v1/chat/completions`.

Decides how a conversation is answered, whole or as a stream, and which text of an answer is a call of a tool. Knows nothing of
templates.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ConfigDict, Field

from lorax_core.errors import CapacityError
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
from lorax_core.server.openai.messages import Messages, NamedTool, ToolChoice, Tools
from lorax_core.server.openai.params import GenerationBody, generate_request
from lorax_core.server.openai.shapes import ChatCompletion, ChatCompletionChunk, answers
from lorax_core.server.schemas import check_size, unsupported
from lorax_core.server.sse import EventStream
from lorax_core.serving.requests import TEMPLATE_OPTIONS, GenerateRequest
from lorax_core.serving.tools import CallReader, ToolCall
from lorax_core.types import Completion, FinishReason, TokenLogprobs

_ACCEPTED = "Accepted, and changes nothing."


class ChatBody(GenerationBody):
    """A conversation to go on with."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}]
        }
    )

    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=100)
    tools: Tools | None = None
    tool_choice: ToolChoice | None = Field(default=None, description='"auto" where there are tools.')
    parallel_tool_calls: bool | None = Field(default=None, description="False allows one call an answer.")
    safety_identifier: str | None = Field(default=None, description=_ACCEPTED)
    prompt_cache_key: str | None = Field(default=None, description=_ACCEPTED)
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, max_length=TEMPLATE_OPTIONS, description="More that the chat template sees."
    )
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(default=None, description="Go on with the text of the last message.")

    store: Any = unsupported(False)
    service_tier: Any = unsupported("auto", "default")
    modalities: Any = unsupported(["text"])
    audio: Any = unsupported()
    prediction: Any = unsupported()
    web_search_options: Any = unsupported()
    reasoning_effort: Any = unsupported(instead="chat_template_kwargs may have it, for templates that know it")
    verbosity: Any = unsupported("medium")
    functions: Any = unsupported(instead="tools are their form today")
    function_call: Any = unsupported(instead="tool_choice is its form today")
    echo: Any = unsupported(False)
    add_special_tokens: Any = unsupported(False, instead="the template writes them")

    @property
    def called(self) -> list[str]:
        """The names of the tools that may be called."""
        return [] if self.choice == "none" else [tool.function.name for tool in self.tools or []]

    @property
    def choice(self) -> str:
        """The tool that must be called, or "none", "auto" or "required"."""
        if isinstance(self.tool_choice, NamedTool):
            return self.tool_choice.function.name
        return self.tool_choice or "auto"

    def check(self) -> None:
        """Raises Refused for what does not fit together."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused("invalid", "top_logprobs without logprobs", hint='add "logprobs": true', param="top_logprobs")
        tokens = (self.max_tokens, self.max_completion_tokens)
        if self.max_tokens == 0 or (None not in tokens and tokens[0] != tokens[1]):
            raise Refused(
                "invalid", "max_tokens is 1 or more, and the same as max_completion_tokens",
                hint="give max_completion_tokens alone", param="max_tokens",
            )  # fmt: skip
        if self.choice in ("none", "auto"):
            return
        if not self.tools:
            raise Refused("invalid", "there are no tools to choose", hint="add tools", param="tool_choice")
        # The answer would be a call, whatever else was asked for.
        if found := self.constraints():
            raise Refused(
                "invalid", f"{next(iter(found))} and a tool that must be called exclude each other",
                hint='give one of them, or "tool_choice": "auto"', param="tool_choice",
            )  # fmt: skip

    def request(self, gateway: Gateway) -> GenerateRequest:
        """What the engine is asked."""
        options = self.options(gateway.options)
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if most is not None:
            options["max_tokens"] = most
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or 0
        if self.called:
            tools = [tool.plain() for tool in self.tools or []]
            check_size([tool["function"].get("parameters") for tool in tools], gateway.options, "tools")
            options |= {"tools": tools, "tool_choice": self.choice}
            options["parallel_tool_calls"] = self.parallel_tool_calls is not False
        template = dict(self.chat_template_kwargs or {})
        for name in ("add_generation_prompt", "continue_final_message"):
            if (value := getattr(self, name)) is not None:
                template[name] = value
        return generate_request(
            self,
            prompt=[message.plain(f"messages.{at}") for at, message in enumerate(self.messages)],
            adapter=gateway.names.adapter(self.model),
            template_options=template,
            **options,
        )


def chat_routes(gateway: Gateway) -> APIRouter:
    """The routes of one server."""
    routes = APIRouter(tags=["openai"])
    texts, heads = TokenTexts(gateway.engine), AnswerHeads(gateway)

    @routes.post("/v1/chat/completions", responses=answers(ChatCompletion, ChatCompletionChunk))
    async def create_chat_completion(http: Request, body: ChatBody) -> Response:
        """Answer a conversation, whole or as a stream."""
        body.check()
        gateway.check_batch(body.n or 1, param="n")
        request = body.request(gateway)
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        start = heads.new(kind, "chatcmpl", body.model)
        if body.stream:
            with _named_as_given(body):
                events = await gateway.events(http, [request])
            chunks = Chunks(start, include_usage=body.include_usage)
            return EventStream(events, _lines(body, events, chunks, texts), failed)
        with _named_as_given(body):
            found = cast("Completion", (await gateway.answer(http, [request]))[0])
        choices = [_choice(body, at, one, texts) for at, one in enumerate((found, *found.alternatives))]
        answer = {**start, "choices": choices, "usage": usage([found])}
        if body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = texts.prompt(found.prompt_logprobs)
        return JSONResponse(answer)

    return routes


@contextlib.contextmanager
def _named_as_given(body: ChatBody) -> Iterator[None]:
    """An answer that is too long is the fault of max_completion_tokens, where that is its name in the body."""
    try:
        yield
    except CapacityError as error:
        if error.option == "max_tokens" and body.max_tokens is None:
            error.option = "max_completion_tokens"
        raise


def _choice(body: ChatBody, index: int, completion: Completion, texts: TokenTexts) -> dict[str, Any]:
    """One answer, whole."""
    reader = CallReader(body.called) if body.called else None
    pieces = [completion.text] if reader is None else [*reader.push(completion.text), *reader.finish()]
    calls = [_call(one) for one in pieces if isinstance(one, ToolCall)]
    text = "".join(one for one in pieces if isinstance(one, str))
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if calls:
        message["tool_calls"] = calls
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(shown_logprobs(completion, completion.logprobs or []), texts) if body.logprobs else None,
        **_end(completion, calls=bool(calls)),
    }


async def _lines(body: ChatBody, events: Events, chunks: Chunks, texts: TokenTexts) -> AsyncGenerator[bytes, None]:
    """The chunks of a stream."""
    count = body.n or 1
    readers = [CallReader(body.called) if body.called else None for _ in range(count)]
    ended: list[tuple[int, Completion]] = []

    def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, **end: Any) -> bytes:
        return chunks.chunk({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None, **end})

    for index in range(count):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for event in events:
        done, reader = event.completion, readers[event.choice]
        pieces: list[str | ToolCall] = [event.text] if event.text else []
        if reader is not None:
            pieces = [*reader.push(event.text), *(reader.finish() if done is not None else [])]
        scores = shown_logprobs(done, event.logprobs) if body.logprobs else []
        logprobs = _logprobs(scores, texts) if scores else None
        before = reader.calls - sum(isinstance(one, ToolCall) for one in pieces) if reader else 0
        for piece in pieces or ([""] if logprobs else []):
            if isinstance(piece, str):
                delta: dict[str, Any] = {"content": piece}
            else:
                delta = {"tool_calls": [{"index": before, **_call(piece)}]}
                before += 1
            yield chunk(event.choice, delta, logprobs)
            logprobs = None  # with the first piece
        if done is not None:
            ended.append((event.choice, done))
            yield chunk(event.choice, {}, **_end(done, calls=reader is not None and reader.calls > 0))
    yield chunks.end(stream_usage(ended))


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _end(completion: Completion, *, calls: bool) -> dict[str, Any]:
    """Why an answer ended."""
    if calls and completion.finish_reason is FinishReason.STOP:
        return {"finish_reason": "tool_calls", "stop_reason": None}
    return {"finish_reason": completion.finish_reason.value, "stop_reason": completion.stop_reason}


def _logprobs(scores: Sequence[TokenLogprobs], texts: TokenTexts) -> dict[str, Any]:
    """Log-probabilities of tokens, with their bytes."""

    def entry(token: int, value: float) -> dict[str, Any]:
        raw = texts.bytes([token])[0]
        return {"token": spelt(raw), "logprob": number(value), "bytes": list(raw)}

    content = [
        {
            **entry(one.token_id, one.logprob),
            "top_logprobs": [entry(token, value) for token, value in one.top.items()],
        }
        for one in scores
    ]
    return {"content": content, "refusal": None}
