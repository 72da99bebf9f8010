"""Token ids to text while they arrive.

Decides when text is safe to show: a character made of several tokens comes out whole or not yet. Knows nothing of stopping.
"""

from __future__ import annotations

from typing import Protocol

_INCOMPLETE = "\ufffd"


class TextDecoder(Protocol):
    """Ids to text, special tokens left out."""

    def decode(self, ids: list[int]) -> str: ...


class Detokenizer:
    """The text of one completion. All pieces together are `decoder.decode(all ids)`.

    Only a window of the newest tokens is decoded each time. Its first tokens were shown already: they are the context of a
    decoder that looks at neighbours, for spaces for instance.
    """

    def __init__(self, decoder: TextDecoder) -> None:
        self._decoder = decoder
        self._ids: list[int] = []
        self._window = 0
        self._shown = 0

    def push(self, token_id: int) -> str:
        """One more token; the text that it completes, which may be empty."""
        self._ids.append(token_id)
        text = self._new_text()
        # Byte-level decoders show the first bytes of an unfinished character as U+FFFD.
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._window, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        """What is left once no more tokens will come; an incomplete character shows as U+FFFD."""
        text = self._new_text()
        self._window = self._shown = len(self._ids)
        return text

    def _new_text(self) -> str:
        # Both decodes start at the window, so the prefix is the same text and can be cut by its length.
        before = self._decoder.decode(self._ids[self._window : self._shown])
        return self._decoder.decode(self._ids[self._window :])[len(before) :]
