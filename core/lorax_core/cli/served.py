"""A running server that answers in place of a model of this process: where MODEL is its address.

Decides which of its models answers, how a request of the Python interface becomes one of OpenAI's API, and what cannot be asked
so. Knows nothing of connections, which are `remote.py`, and nothing of terminals.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import lorax_core
from lorax_core.cli.remote import ask, events, root_of, rows_of
from lorax_core.errors import AdapterError, RequestError, listed, nearest
from lorax_core.types import Completion, FinishReason, Usage

_ADDRESSES: Final = ("http://", "https://")
_NO_SUM: Final = "a server is asked for one adapter by its name, not for a sum"
_NOT_OURS: Final = "is it a server with OpenAI's API? curl URL/v1/models"


def is_address(model: str) -> bool:
    """Whether a MODEL is the address of a server, and no checkpoint."""
    return model.startswith(_ADDRESSES)


def looks_like_address(model: str) -> bool:
    """Whether a MODEL is the address of a server but for its beginning."""
    return re.fullmatch(r"[\w.-]+:\d{2,5}(/v1)?/?", model) is not None


@dataclass(frozen=True, slots=True)
class ServedEvent:
    """A piece of the answer of this number, as it came. Its last piece has why it ended, and one of all has the usage."""

    text: str = ""
    choice: int = 0
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Server:
    """A server and the names of its models: `base` answers where nothing else is asked for."""

    url: str
    base: str
    adapters: tuple[str, ...]
    key: str | None = None

    @classmethod
    def at(cls, url: str) -> Self:
        """Asks the server at this address for its models. Raises RequestError where none can be had."""
        from lorax_core.settings import Settings

        url = root_of(url)
        key = next(iter(Settings.from_env().api_keys), None)
        models = rows_of(url, ask(url, "/v1/models", key), "data")
        names = [str(model.get("id")) for model in models]
        if not names:
            raise RequestError(f"{url:.200} serves no model", hint=_NOT_OURS)
        # An adapter names its base.
        base = next((name for name, model in zip(names, models, strict=True) if not model.get("parent")), names[0])
        return cls(url, base, tuple(name for name in names if name != base), key)

    def chosen(self, use: str | None) -> str | None:
        """The name of the adapter that is to answer, None for the base. Raises AdapterError for one that it does not have."""
        if use is None or use == self.base:
            return None
        if use in self.adapters:
            return use
        if "=" in use:
            raise AdapterError(_NO_SUM, hint=f"give one NAME of {listed([self.base, *self.adapters])}")
        close = nearest(use, self.adapters)
        hint = f"did you mean {close!r}?" if close else "`lorax serve --adapter NAME=SOURCE` loads it there"
        served = listed([self.base, *self.adapters])
        raise AdapterError(f"no model or adapter of {self.url:.200} is called {use!r}; there are {served}", hint=hint)

    def stream(self, request: lorax_core.GenerateRequest) -> Generator[ServedEvent]:
        """The pieces of the answers. Closing the iterator ends them. Raises RequestError where the server does."""
        route, body = _asked(request, self.base)
        answered = False
        for event in events(self.url, route, self.key, body):
            try:
                for piece in _pieces(event, request.n):
                    answered = True
                    yield piece
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise RequestError(f"{self.url:.200}: an event is not of OpenAI's form", hint=_NOT_OURS) from error
        if not answered:
            raise RequestError(f"{self.url:.200} ended its answer before it began", hint=_NOT_OURS)


def completions_of(pieces: Iterable[ServedEvent]) -> list[Completion]:
    """Whole answers. The usage of all of them together is that of the first; token ids are not known."""
    texts: dict[int, list[str]] = {}
    reasons: dict[int, FinishReason] = {}
    usage = Usage(0)
    for piece in pieces:
        usage = piece.usage or usage
        texts.setdefault(piece.choice, []).append(piece.text)
        if piece.finish_reason is not None:
            reasons[piece.choice] = piece.finish_reason
    return [
        Completion("".join(texts[choice]), [], reasons.get(choice, FinishReason.STOP), Usage(0) if at else usage)
        for at, choice in enumerate(sorted(texts))
    ]


def _asked(request: lorax_core.GenerateRequest, base: str) -> tuple[str, dict[str, Any]]:
    """The route and the body that ask the same."""
    given = request.model_dump(exclude_defaults=True)
    prompt, adapter = given.pop("prompt"), given.pop("adapter", None)
    if isinstance(adapter, dict):
        raise RequestError(_NO_SUM, hint="give one NAME")
    # OpenAI's default temperature is not ours.
    body: dict[str, Any] = {"model": adapter or base, "temperature": request.temperature}
    if (schema := given.pop("json_schema", None)) is not None:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    # As vLLM has it, and so do we.
    if constraint := {name: given.pop(name) for name in ("regex", "choice") if name in given}:
        body["structured_outputs"] = constraint
    if unknown := given.keys() - _SAME:
        raise RequestError(f"a server cannot be asked for {listed(sorted(unknown))}", hint="leave it out")
    body |= given | {"stream": True, "stream_options": {"include_usage": True}}
    if isinstance(prompt, str):
        return "/v1/completions", {**body, "prompt": prompt}
    return "/v1/chat/completions", {**body, "messages": prompt}


_SAME: Final = frozenset({
    "frequency_penalty", "ignore_eos", "logit_bias", "max_tokens", "min_p", "min_tokens", "n", "presence_penalty",
    "repetition_penalty", "seed", "stop", "stop_token_ids", "temperature", "top_k", "top_p", "typical_p",
})  # fmt: skip
"""Options of `GenerateRequest` that the server calls the same."""


def _pieces(event: Mapping[str, Any], answers: int) -> Iterator[ServedEvent]:
    """What an event says of so many answers. Raises for what is not of OpenAI's form."""
    for choice in event.get("choices") or ():
        text = choice["delta"].get("content") if "delta" in choice else choice["text"]
        reason = choice.get("finish_reason")
        yield ServedEvent(
            text=_text(text or ""),
            choice=_number(choice.get("index", 0), answers),
            finish_reason=None if reason is None else _reason(reason),
        )
    if (usage := event.get("usage")) is not None:
        counts = (usage["prompt_tokens"], usage.get("completion_tokens", 0))
        yield ServedEvent(usage=Usage(*(_number(count, 2**31) for count in counts)))


def _number(found: Any, below: int) -> int:
    if not (isinstance(found, int) and 0 <= found < below):
        raise ValueError("a number is out of its range")
    return found


def _text(found: Any) -> str:
    if not isinstance(found, str):
        raise TypeError(f"{type(found).__name__} is not text")
    return found


def _reason(found: Any) -> FinishReason:
    """Ours; those of other servers that we do not have are an end like others."""
    return FinishReason(found) if found in [*FinishReason] else FinishReason.STOP
