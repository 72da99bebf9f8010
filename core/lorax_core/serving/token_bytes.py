"""The bytes that single tokens stand for.

Decides how the spelling of a vocabulary becomes bytes: several tokens may make one character, so not every token is text. Knows
nothing of how texts become tokens.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any, Final

_BLANK: Final = "\u2581"
"""SentencePiece's sign for a space."""


class TokenBytes:
    """Bytes of the tokens of one tokenizer. Safe to call from any thread."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def of(self, ids: list[int], *, special: bool) -> list[bytes]:
        """Bytes of each token; those of special ones are their names, or none without `special`."""
        spelt: list[str | None] = self._tokenizer.convert_ids_to_tokens(ids)
        return [self._bytes(at, name, special) for at, name in zip(ids, spelt, strict=True)]

    def _bytes(self, token_id: int, name: str | None, special: bool) -> bytes:
        if name is None or (not special and token_id in self._special):
            return b""
        if token_id in self._added:
            return name.encode()
        if "ByteLevel" in self._decoders:
            # A character beyond the alphabet stands for itself.
            return b"".join(bytes([_BYTES[one]]) if one in _BYTES else one.encode() for one in name)
        if "ByteFallback" in self._decoders and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        if "WordPiece" in self._decoders:
            return (name[2:] if name.startswith("##") else f" {name}").encode()
        return name.replace(_BLANK, " ").encode()

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self._tokenizer.all_special_ids)

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.added_tokens_decoder)

    @cached_property
    def _decoders(self) -> frozenset[str]:
        """Kinds of the decoders of a fast tokenizer, those in sequences too."""
        decoder = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "decoder", None)
        left, kinds = [] if decoder is None else [json.loads(decoder.__getstate__())], set()
        while left:
            one = left.pop()
            kinds.add(str(one.get("type")))
            left += one.get("decoders", [])
        return frozenset(kinds)


def _alphabet() -> dict[str, int]:
    """The characters with which byte-level tokenizers spell bytes: printable ones are themselves, others follow from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(one): one for one in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTES: Final = _alphabet()
