"""When a completion ends, and what of its text may be shown before it does.

Decides by token ids, by strings in the text, and by length. Knows nothing of models or tokenizers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopRule:
    """Ends a completion at a stop token, at a stop string, or after `max_tokens` new tokens; the first two not before
    `min_tokens`.
    """

    max_tokens: int
    min_tokens: int = 0
    token_ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()


class StopText:
    """Searches new text for stop strings before it is shown.

    A tail that may be the beginning of a stop string is held back until more text decides it.
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._strings = strings
        self._held = ""

    def feed(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """Add new text; gives the text that may be shown, and the stop string that was found (shown text ends before it).

        While not `armed`, text is not searched.
        """
        if not self._strings:
            return text, None
        self._held += text
        if not armed:
            return self.flush(), None
        found = [(at, string) for string in self._strings if (at := self._held.find(string)) >= 0]
        if found:
            at, string = min(found)
            shown, self._held = self._held[:at], ""
            return shown, string
        keep = max(_overlap(self._held, string) for string in self._strings)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, None

    def flush(self) -> str:
        """What was held back, once no more text will come."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` with which `string` begins, `string` itself left out."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
