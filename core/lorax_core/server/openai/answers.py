"""What OpenAI's generating routes answer in common.

Decides how an answer begins, what usage and log-probabilities look like, and how a stream fails. Knows nothing of requests.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Final

from lorax_core.server.errors import failure, openai_body
from lorax_core.server.gateway import Gateway
from lorax_core.server.sse import data, encoded
from lorax_core.serving.engine import Engine
from lorax_core.types import Completion, TokenLogprobs
from lorax_core.version import __version__

DONE: Final = b"data: [DONE]\n\n"
_LEAST: Final = -9999.0
"""For a probability of 0, whose logarithm JSON cannot write; vLLM has the same."""


class AnswerHeads:
    """The beginnings of a server's answers and chunks."""

    def __init__(self, gateway: Gateway) -> None:
        self._base, info = gateway.names.base, gateway.engine.info()
        # What makes answers to equal requests with equal seeds differ.
        made_of = f"{__version__} {self._base} {info.dtype} {info.device} {info.attention}"
        self._fingerprint = f"fp_{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"

    def new(self, kind: str, prefix: str, model: str | None) -> dict[str, Any]:
        """That of one answer, and of all chunks of one stream."""
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model or self._base,
            "system_fingerprint": self._fingerprint,
        }


class Chunks:
    """The events of one stream: what is the same in all is written once."""

    def __init__(self, start: dict[str, Any], *, include_usage: bool) -> None:
        self._before = b"data: " + encoded(start)[:-1] + b',"choices":['
        self._after = (b'],"usage":null' if include_usage else b"]") + b"}\n\n"
        self._start, self._include_usage = start, include_usage

    def chunk(self, choice: dict[str, Any]) -> bytes:
        """What is new of one choice."""
        return self._before + encoded(choice) + self._after

    def end(self, spent: dict[str, Any]) -> bytes:
        """What comes after the last choice; `spent` is shown where the client asked for it."""
        return (data({**self._start, "choices": [], "usage": spent}) if self._include_usage else b"") + DONE


def usage(completions: Iterable[Completion], *, shown: bool = True) -> dict[str, Any]:
    """The tokens of first answers, their prompts and their alternatives; the answers count for nothing unless `shown`."""
    prompt = completion = cached = 0
    for one in completions:
        prompt += one.usage.prompt_tokens
        cached += one.usage.cached_tokens
        completion += sum(each.usage.completion_tokens for each in (one, *one.alternatives)) if shown else 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def stream_usage(completions: Iterable[tuple[int, Completion]], *, shown: bool = True) -> dict[str, Any]:
    """The same of a stream's answers, each with the number of its choice: a prompt counts once."""
    whole = list(completions)
    first = usage((one for choice, one in whole if choice == 0), shown=shown)
    others = sum(one.usage.completion_tokens for choice, one in whole if choice and shown)
    first["completion_tokens"] += others
    first["total_tokens"] += others
    return first


def failed(error: BaseException) -> bytes:
    """The last event of a stream that goes wrong on the way."""
    return data(openai_body(failure(error))[1])


def shown_logprobs(completion: Completion | None, scores: Sequence[TokenLogprobs]) -> Sequence[TokenLogprobs]:
    """Those of tokens that are in the text: a token that ended the completion is the last, and is not."""
    return scores[:-1] if completion is not None and isinstance(completion.stop_reason, int) else scores


class TokenTexts:
    """Tokens as log-probabilities show them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[int, bytes] = {}

    def bytes(self, ids: Iterable[int]) -> list[bytes]:
        """The bytes of tokens."""
        wanted = list(ids)
        new = [one for one in dict.fromkeys(wanted) if one not in self._known]
        if new:
            self._known.update(zip(new, self._engine.token_bytes(new), strict=True))
        return [self._known[one] for one in wanted]

    def text(self, token: int) -> str:
        """A token as text; its bytes, where it is a part of a character."""
        return spelt(self.bytes([token])[0])

    def ranked(self, entry: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens of one position, and the one that is there, by text."""
        found: dict[str, float] = {}
        # Two tokens may have one text: the likelier is shown.
        for token, value in sorted({**entry.top, entry.token_id: entry.logprob}.items(), key=lambda one: -one[1]):
            found.setdefault(self.text(token), number(value))
        return found

    def prompt(self, scores: Sequence[TokenLogprobs | None] | None) -> list[dict[str, Any] | None] | None:
        """Log-probabilities of a prompt as vLLM has them, by token id."""
        return None if scores is None else [None if one is None else self._by_id(one) for one in scores]

    def _by_id(self, entry: TokenLogprobs) -> dict[str, Any]:
        ranks = {token: at for at, token in enumerate(entry.top, 1)}
        return {
            str(token): {"logprob": number(value), "rank": ranks.get(token), "decoded_token": self.text(token)}
            for token, value in {entry.token_id: entry.logprob, **entry.top}.items()
        }


def spelt(raw: bytes) -> str:
    """Bytes as text, or as OpenAI writes what is none."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def number(logprob: float) -> float:
    """A log-probability that JSON can write."""
    return max(logprob, _LEAST)
