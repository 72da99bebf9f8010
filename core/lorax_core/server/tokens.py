"""Texts as tokens, for the APIs that show them.

Decides where tokenizing happens, and which tokens are left out. Knows nothing of any API's shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lorax_core.server.errors import Refused
from lorax_core.server.gateway import INLINE_CHARACTERS, Gateway
from lorax_core.serving.engine import Engine
from lorax_core.serving.requests import AdapterChoice
from lorax_core.types import Tokenized

_MOST_CHARACTERS: Final = 256 * 1024
"""More than these take seconds and an answer of many megabytes."""


@dataclass(frozen=True, slots=True)
class TextToken:
    """A token: the tokenizer's own spelling of it, and the characters of the text that it covers."""

    id: int
    token: str
    special: bool
    start: int
    stop: int


async def tokenized(
    gateway: Gateway, texts: Sequence[str], *, special: bool, adapter: AdapterChoice = None
) -> list[list[TextToken]]:
    """The tokens of each text as an adapter reads it, with those that the tokenizer adds where `special`."""
    characters = sum(map(len, texts))
    if characters > _MOST_CHARACTERS:
        raise Refused(
            "too_large",
            f"{characters:,} characters; one request may have {_MOST_CHARACTERS:,} tokenized",
            hint="send them in several requests",
            param="inputs",
        )
    # An adapter may have to be fetched first.
    if characters <= INLINE_CHARACTERS and adapter is None:
        return _all(gateway.engine, texts, adapter, special)
    return await gateway.in_thread(_all, gateway.engine, texts, adapter, special)


async def detokenized(gateway: Gateway, rows: Sequence[list[int]], adapter: AdapterChoice = None) -> list[str]:
    """The text of each list of token ids as an adapter writes it, special ones left out."""
    count = sum(map(len, rows))
    if count > _MOST_CHARACTERS:
        raise Refused(
            "too_large",
            f"{count:,} token ids; one request may have {_MOST_CHARACTERS:,}",
            hint="send them in several requests",
            param="ids",
        )
    return await gateway.in_thread(_texts, gateway.engine, rows, adapter)


def _texts(engine: Engine, rows: Sequence[list[int]], adapter: AdapterChoice) -> list[str]:
    return [engine.detokenize(ids, adapter=adapter) for ids in rows]


def _all(engine: Engine, texts: Sequence[str], adapter: AdapterChoice, special: bool) -> list[list[TextToken]]:
    return [_tokens(engine.tokenize(text, adapter=adapter), special) for text in texts]


def _tokens(found: Tokenized, special: bool) -> list[TextToken]:
    # Without offsets where the tokenizer has none.
    offsets = found.offsets or [(0, 0)] * len(found.ids)
    return [
        TextToken(id, token, added, *offset)
        for id, token, added, offset in zip(found.ids, found.tokens, found.special, offsets, strict=True)
        if special or not added
    ]
