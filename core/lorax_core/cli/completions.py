"""How commands show a completion: as it is made, whole, or as JSON.

Decides the looks. Knows nothing of what was asked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from lorax_core.serving.engine import Engine
    from lorax_core.serving.stream import Stream
    from lorax_core.types import Completion, TokenLogprobs


# What a terminal obeys (but line feeds and tabs), what turns the direction of a line, and what is no text.
_OBEYED: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def show_text(text: str) -> None:
    """Text to stdout as a model wrote it; at a terminal, what that would obey is shown as escapes."""
    if sys.stdout.isatty():
        text = _OBEYED.sub(lambda found: repr(found[0])[1:-1], text)
    # Flushed: in a pipe stdout is buffered, and nothing would stream.
    print(text, end="", flush=True)


def follow(stream: Stream, quiet: bool = False) -> list[Completion]:
    """The whole answers; unless `quiet`, each piece is printed as it comes."""
    found: dict[int, Completion] = {}
    for event in stream:
        if not quiet:
            show_text(event.text)
        # Only the last event of an answer has one.
        if event.completion is not None:
            found[event.choice] = event.completion
    if not quiet:
        show_text("\n")
    return [found[choice] for choice in sorted(found)]


def blocks(answers: Sequence[Completion], title: str = "") -> Iterator[str]:
    """The answers to one prompt as lines, each below a heading as `head` and `tail` put above files."""
    for number, answer in enumerate(answers, 1):
        parts = filter(None, (title, f"answer {number}" if len(answers) > 1 else ""))
        yield f"==> {', '.join(parts)} <=="
        yield answer.text


def summary(answers: Sequence[Completion], seconds: float) -> str:
    """How long answers took, and why they ended."""
    tokens = sum(one.usage.completion_tokens for one in answers)
    count = "1 token" if tokens == 1 else f"{tokens} tokens"
    return f"{count} in {seconds:.2f} s; ended by: {', '.join(one.finish_reason for one in answers)}"


def answers_json(engine: Engine, answers: Sequence[Completion]) -> dict[str, Any]:
    """All that is known of the answers to one prompt: of the first, and below it of the others."""
    first, *others = answers
    usage = first.usage
    found: dict[str, Any] = {
        "text": first.text,
        "token_ids": first.token_ids,
        "finish_reason": str(first.finish_reason),
        "stop_reason": first.stop_reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
        },
    }
    if first.logprobs is not None:
        found["logprobs"] = _logprobs(engine, first.logprobs)
    if others:
        found["alternatives"] = [answers_json(engine, [one]) for one in others]
    return found


def _logprobs(engine: Engine, logprobs: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
    return [
        {
            **_tokens(engine, [(one.token_id, one.logprob)])[0],
            "top": _tokens(engine, one.top.items()),
        }
        for one in logprobs
    ]


def _tokens(engine: Engine, found: Iterable[tuple[int, float]]) -> list[dict[str, Any]]:
    pairs = list(found)
    names = engine.token_bytes([token for token, _ in pairs])
    return [
        # A token may be a part of a character.
        {"token_id": token, "token": name.decode(errors="replace"), "logprob": logprob}
        for (token, logprob), name in zip(pairs, names, strict=True)
    ]
