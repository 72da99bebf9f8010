"""What OpenAI's API answers, as `/openapi.json` describes it.

Decides the shapes alone: answers are built as plain dicts, which costs less, and tests hold them to these models.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from lorax_core.server.schemas import AnswerShape, OpenAIError

Finish = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(AnswerShape):
    """Tokens of the prompt that were found in the cache."""

    cached_tokens: int


class TokenUsage(AnswerShape):
    """Tokens of all prompts and answers of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ModelCard(AnswerShape):
    """The base, or an adapter over it, whose `parent` is the base."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(AnswerShape):
    """The base first, then the adapters that are loaded."""

    object: Literal["list"]
    data: list[ModelCard]


PromptLogprobs = list[dict[str, dict[str, Any]] | None] | None


class CompletionLogprobs(AnswerShape):
    """A position each: the token, where its text begins, its log-probability, and those of the most likely."""

    tokens: list[str]
    text_offset: list[int]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(AnswerShape):
    """One answer to one prompt: `index` counts the answers of the first prompt, then those of the second."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs = None


class TextCompletion(AnswerShape):
    """The answer of /v1/completions; a stream is made of these, too."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: TokenUsage | None = None


class TopLogprob(AnswerShape):
    """A token that may have come; `bytes` because a token may be part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """The token that came, and the most likely."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(AnswerShape):
    """An entry for each token."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class CalledFunction(AnswerShape):
    """What is called; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


class AnsweredCall(AnswerShape):
    """A call that the model makes; in streams with its `index`."""

    id: str
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None


class AnsweredMessage(AnswerShape):
    """The message of the assistant."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[AnsweredCall] | None = None


class ChatChoice(AnswerShape):
    """One of `n` answers."""

    index: int
    message: AnsweredMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    stop_reason: int | str | None = None


class ChatCompletion(AnswerShape):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: TokenUsage
    prompt_logprobs: PromptLogprobs = None


class ChatDelta(AnswerShape):
    """What is new of a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[AnsweredCall] | None = None


class ChatChunkChoice(AnswerShape):
    """What is new of one of `n` answers."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    stop_reason: int | str | None = None


class ChatCompletionChunk(AnswerShape):
    """One event of a stream; the last one may have no choices and the usage of all."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: TokenUsage | None = None


class EmbeddingItem(AnswerShape):
    """A vector, as numbers or as base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(AnswerShape):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(AnswerShape):
    """The answer of /v1/embeddings, in the order of the inputs."""

    object: Literal["list"]
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage


_MEANINGS: Final = {
    400: "The request is wrong; the error says where",
    401: "An API key is needed",
    404: "There is no such model",
    408: "The body did not arrive in time",
    413: "The body, or the number of inputs, is too large",
    429: "Too many requests wait; Retry-After says when to try again",
    500: "The server failed",
    503: "The server is shutting down",
    504: "The answer took longer than it may",
}
ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": OpenAIError, "description": meaning} for status, meaning in _MEANINGS.items()
} | {"4XX": {"model": OpenAIError, "description": "Any other error of the request"}}
"""The `responses` of a route beside its answer."""


def answers(model: type[AnswerShape], chunk: type[AnswerShape] | None = None) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers `model`, or a stream of `chunk`s."""
    stream = "" if chunk is None else f"; with `stream`, server-sent events of {chunk.__name__}, then `[DONE]`"
    found: dict[str, Any] = {"model": model, "description": f"The answer{stream}"}
    if chunk is not None:
        found["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    return ERRORS | {200: found}
