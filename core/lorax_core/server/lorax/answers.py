"""Completions as LoRAX's clients read them.

Decides which answer is the best, how its text is spread over its tokens, and what headers say of it. Knows nothing of requests
beyond what `Asked` has.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from lorax_core.engine.detokenizer import Detokenizer
from lorax_core.server.errors import failure, lorax_body
from lorax_core.server.gateway import Events, Gateway
from lorax_core.server.lorax.params import Asked
from lorax_core.server.sse import data
from lorax_core.serving.engine import Engine
from lorax_core.types import Completion, FinishReason, TokenLogprobs

_IN_HEADER: Final = "/:,@+=~ "


@dataclass
class Clock:
    """When a request came, and when it was understood, in seconds."""

    start: float
    valid: float

    @classmethod
    def started(cls) -> Clock:
        """A clock that begins now."""
        now = time.monotonic()
        return cls(now, now)

    def understood(self) -> None:
        """The request is known to be valid."""
        self.valid = time.monotonic()


def best(completions: Sequence[Completion]) -> list[int]:
    """Indices of answers, that of the highest mean log-probability of its tokens first."""
    return sorted(range(len(completions)), key=lambda at: -_mean(completions[at]))


def _mean(completion: Completion) -> float:
    scores = [one.logprob for one in completion.logprobs or ()]
    return sum(scores) / max(len(scores), 1)


def generated(engine: Engine, asked: Asked, completions: Sequence[Completion]) -> dict[str, Any]:
    """The answer to one prompt, of several completions the best."""
    order = best(completions)
    first = completions[order[0]]
    answer: dict[str, Any] = {"generated_text": _text(asked, first)}
    if asked.parameters.with_details:
        prefill = _prefill(engine, asked, first)
        details = {
            "finish_reason": _finish(first),
            "prompt_tokens": first.usage.prompt_tokens,
            "generated_tokens": first.usage.completion_tokens,
            "seed": asked.requests[order[0]].seed,
            "prefill": prefill,
            "tokens": _tokens(engine, asked, first),
        }
        if len(completions) > 1:
            details["best_of_sequences"] = [
                {
                    "generated_text": _text(asked, completions[at]),
                    "finish_reason": _finish(completions[at]),
                    "generated_tokens": completions[at].usage.completion_tokens,
                    "seed": asked.requests[at].seed,
                    "prefill": prefill,
                    "tokens": _tokens(engine, asked, completions[at]),
                }
                for at in order[1:]
            ]
        answer["details"] = details
    return answer


async def events(gateway: Gateway, asked: Asked, coming: Events) -> AsyncGenerator[bytes, None]:
    """One event for each token; the last has the text and, where asked for, the details."""
    engine = gateway.engine
    async for event in coming:
        done = event.completion
        # An end without a token of its own would have no place.
        ids = event.token_ids or (done.token_ids[-1:] if done is not None else [])
        scores = event.logprobs or ((done.logprobs or [])[-1:] if done is not None else [])
        texts = _spread(engine, ids, event.text)
        tokens = [_token(engine, asked, score, text) for score, text in zip(scores, texts, strict=True)]
        if tokens and event.text and all(token["special"] for token in tokens):
            # Text that was held back, as a stop string may begin so. It must not be lost on clients who skip special tokens.
            tokens[-1] |= {"text": event.text, "special": False}
        for at, token in enumerate(tokens):
            last = done if at == len(tokens) - 1 else None
            yield data({"token": token, "generated_text": None, "details": None} | _end(asked, last))


def _end(asked: Asked, done: Completion | None) -> dict[str, Any]:
    """What the last event has beside its token."""
    if done is None:
        return {}
    details = {
        "finish_reason": _finish(done),
        "prompt_tokens": done.usage.prompt_tokens,
        "generated_tokens": done.usage.completion_tokens,
        "seed": asked.requests[0].seed,
    }
    return {"generated_text": _text(asked, done), "details": details if asked.parameters.details else None}


def failed(error: BaseException) -> bytes:
    """The event of a stream that broke."""
    return data(lorax_body(failure(error))[1])


def headers(gateway: Gateway, asked: Asked) -> dict[str, str]:
    """What is known before anything is computed."""
    device = gateway.engine.info().device
    found = {
        "x-compute-type": f"{'gpu' if device.startswith('cuda') else device}+optimized",
        "x-compute-characters": str(len(asked.prompt)),
        "x-model-id": quote(gateway.names.base, _IN_HEADER),
    }
    if asked.adapter is not None:
        names, source = asked.adapter
        found |= {"x-adapter-id": quote(names, _IN_HEADER), "x-adapter-source": source}
    return found


def spans(clock: Clock, queued: float) -> dict[str, str]:
    """How long an answer took, in milliseconds; `queued` are the seconds before its first step."""
    total = time.monotonic() - clock.start
    return {
        "x-compute-time": _milliseconds(total),
        "x-total-time": _milliseconds(total),
        "x-validation-time": _milliseconds(clock.valid - clock.start),
        "x-queue-time": _milliseconds(queued),
        "x-inference-time": _milliseconds(clock.start + total - clock.valid - queued),
    }


def times(clock: Clock, queued: float, completions: Sequence[Completion]) -> dict[str, str]:
    """The same, and how many tokens the answer has and what each took."""
    found, usage = spans(clock, queued), completions[best(completions)[0]].usage
    inference = time.monotonic() - clock.valid - queued
    return found | {
        "x-time-per-token": _milliseconds(inference / max(usage.completion_tokens, 1)),
        "x-prompt-tokens": str(usage.prompt_tokens),
        "x-generated-tokens": str(usage.completion_tokens),
        "x-total-tokens": str(usage.total_tokens),
    }


def _milliseconds(seconds: float) -> str:
    return str(int(max(seconds, 0.0) * 1000))


def _text(asked: Asked, completion: Completion) -> str:
    return asked.prompt + completion.text if asked.parameters.return_full_text else completion.text


def _finish(completion: Completion) -> str:
    if completion.finish_reason is FinishReason.LENGTH:
        return "length"
    return "stop_sequence" if isinstance(completion.stop_reason, str) else "eos_token"


def _tokens(engine: Engine, asked: Asked, completion: Completion) -> list[dict[str, Any]]:
    texts = _spread(engine, completion.token_ids, completion.text)
    return [_token(engine, asked, score, text) for score, text in zip(completion.logprobs or (), texts, strict=True)]


def _token(engine: Engine, asked: Asked, score: TokenLogprobs, text: str) -> dict[str, Any]:
    special = score.token_id in engine.special_ids
    token: dict[str, Any] = {"id": score.token_id, "text": text, "logprob": _number(score.logprob), "special": special}
    if asked.parameters.return_k_alternatives is not None:
        spelt = _spelt(engine, list(score.top))
        token["alternative_tokens"] = [
            {"id": one, "text": text, "logprob": _number(logprob)}
            for (one, logprob), text in zip(score.top.items(), spelt, strict=True)
        ]
    return token


def _number(logprob: float) -> float:
    """JSON has no infinity, which is what an impossible token has."""
    return max(logprob, -9999.0)


def _spread(engine: Engine, ids: Sequence[int], text: str) -> list[str]:
    """`text` cut to where each of its tokens ends; special tokens, which have no part in it, by themselves."""
    special = engine.special_ids
    plain = [at for at, token in enumerate(ids) if token not in special]
    found = {at: _spelt(engine, [token])[0] for at, token in enumerate(ids) if token in special}
    if len(plain) == 1:
        return [text if at in plain else found[at] for at in range(len(ids))]
    pieces, left = Detokenizer(_Decoder(engine)), text
    for at in plain:
        length = len(pieces.push(ids[at]))
        found[at], left = left[:length], left[length:]
    if plain:
        found[plain[-1]] += left  # of a character that did not become whole
    return [found[at] for at in range(len(ids))]


def _spelt(engine: Engine, ids: list[int]) -> list[str]:
    """The text of each token by itself, of special ones too; part of a character shows as U+FFFD."""
    return [spelt.decode("utf-8", "replace") for spelt in engine.token_bytes(ids)]


class _Decoder:
    """An engine's tokenizer, for `Detokenizer`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def decode(self, ids: list[int]) -> str:
        """Ids to text."""
        return self._engine.detokenize(ids) if ids else ""


def _prefill(engine: Engine, asked: Asked, completion: Completion) -> list[dict[str, Any]]:
    """The tokens of the prompt, where they were asked for."""
    scores = completion.prompt_logprobs
    if scores is None:
        return []
    whole = engine.tokenize(asked.prompt, adapter=asked.requests[0].adapter)
    # Of a prompt that was cut, the tokens after its special ones went.
    at = 0 if whole.special[0] else len(whole.ids) - completion.usage.prompt_tokens
    ids = [whole.ids[at], *(one.token_id for one in scores[1:] if one is not None)]
    logprobs: Iterable[float | None] = (None if one is None else _number(one.logprob) for one in scores)
    return [
        {"id": one, "text": text, "logprob": logprob}
        for one, text, logprob in zip(ids, _spelt(engine, ids), logprobs, strict=True)
    ]
