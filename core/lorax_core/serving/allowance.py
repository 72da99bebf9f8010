"""What one rendering of a template may use.

Decides how much is too much: steps, characters, the size of one value, and time. Costs are counted before the work where a
single operation could be huge. Knows nothing of template engines.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

STEPS: Final = 2_000_000
"""Passes of loops, calls, filters and operators; a conversation of 1,000 messages takes some 20,000."""
CHARACTERS: Final = 64 * 2**20
"""Characters of all texts that are made on the way, with 8 for each element of a list."""
VALUE: Final = 4 * 2**20
"""Characters of one value, with all that lies within it."""
SECONDS: Final = 5.0
BITS: Final = 10_000
"""The largest whole number; Python itself prints none of more than 14,285 bits."""

# Widths of five digits, or given by another value: of `%` and of `format`.
_WIDE: Final = re.compile(r"%[^a-zA-Z%]*(\d{5}|\*)")
_WIDE_FIELD: Final = re.compile(r"\{[^{}]*(\d{5}|\{)")
_ELEMENT: Final = 8
# Filters that look at each element.
_EACH: Final = frozenset(
    """
    batch dictsort groupby items join list map max min reject rejectattr reverse select selectattr slice sort sum unique
    """.split()  # noqa: SIM905
)


class TooMuch(Exception):
    """More than a template may use."""


class Allowance:
    """What is left to one rendering; each method raises TooMuch once that is used up."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._steps = STEPS
        self._characters = CHARACTERS
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        # By id, with the value itself, so that the id stays its own. Values in a sandbox do not change.
        self._weights: dict[int, tuple[Any, int]] = {}

    def step(self, count: int = 1) -> None:
        """One pass of a loop, call, filter or operator; or as many as a filter has elements to look at."""
        self._steps -= count
        if self._steps < 0:
            raise TooMuch(f"it takes more than {STEPS:,} steps")
        if time.monotonic() > self._deadline:
            raise TooMuch(f"it takes more than {self._seconds:g} seconds")

    def text(self, length: int) -> None:
        """So many characters are made."""
        self._characters -= length
        if length > VALUE:
            raise TooMuch(f"it makes a value of more than {VALUE:,} characters")
        if self._characters < 0:
            raise TooMuch(f"it makes more than {CHARACTERS:,} characters")

    def made(self, value: Any) -> Any:
        """Account for a value that was made; gives the value."""
        if isinstance(value, (str, bytes)):
            self.text(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.text(_ELEMENT * len(value))
            self.weight(value)
        elif isinstance(value, int):
            self.number(value.bit_length())
        return value

    def number(self, bits: int) -> None:
        """A whole number of so many bits is made."""
        if bits > BITS:
            raise TooMuch(f"it makes a number of more than {BITS:,} bits")

    def weight(self, value: Any) -> int:
        """Characters of a value as text, about. What lies in a list twice counts twice: printed, it is there twice."""
        if isinstance(value, (str, bytes)):
            return len(value)
        if not isinstance(value, (list, tuple, dict)):
            return _ELEMENT
        known = self._weights.get(id(value))
        if known is not None:
            return known[1]
        inside: Iterable[Any] = [*value, *value.values()] if isinstance(value, dict) else value
        weight = _ELEMENT + sum(_ELEMENT + self.weight(one) for one in inside)
        self._weights[id(value)] = value, weight
        if weight > VALUE:
            raise TooMuch(f"it makes a value of more than {VALUE:,} characters")
        return weight

    def operator(self, sign: str, left: Any, right: Any) -> None:
        """An operator is about to be applied."""
        self.step()
        if isinstance(left, int) and isinstance(right, int):
            if sign == "*":
                self.number(left.bit_length() + right.bit_length())
            elif sign == "**":
                self.number(left.bit_length() * max(right, 0))
        elif sign == "*":
            times, what = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and isinstance(what, (str, bytes, list, tuple)):
                self.text(max(times, 0) * self.weight(what))
        elif sign == "%" and isinstance(left, (str, bytes)):
            self.formatted(left, [right])

    def formatted(self, form: str | bytes, values: Iterable[Any], *, fields: bool = False) -> None:
        """`form` is about to be filled with values, each of which may stand in every place of it; `fields` are in braces."""
        shown = form if isinstance(form, str) else form.decode("latin-1")
        wide = _WIDE_FIELD.search(shown.replace("{{", "").replace("}}", "")) if fields else _WIDE.search(shown)
        if wide:
            raise TooMuch(f"it formats with {shown!r:.60}, whose widths are too large or not fixed")
        places = shown.count("{" if fields else "%")
        # Four digits are left, so a place is up to 9,999 wide.
        widest = max((self.weight(value) for value in values), default=0) + 9_999 * bool(re.search(r"\d", shown))
        self.text(len(shown) + places * (widest + 99))

    def called(self, name: str, on: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """A filter, or a method of text, is about to be applied to `on`."""
        self.step(1 + (len(on) if name in _EACH and isinstance(on, (list, tuple, dict, range)) else 0))
        given = [*args, *named.values()]
        numbers = [abs(one) for one in given if isinstance(one, int) and not isinstance(one, bool)]
        texts = [len(one) for one in given if isinstance(one, (str, bytes))]
        size = len(on) if isinstance(on, (str, bytes, list, tuple, dict)) else 0
        if name in ("center", "ljust", "rjust", "zfill", "batch", "slice", "to_bytes", "round"):
            size += max(numbers, default=0)
        elif name == "expandtabs" and isinstance(on, str):
            size += on.count("\t") * max(numbers, default=8)
        elif name == "indent" and isinstance(on, str):
            size += (on.count("\n") + 1) * max([*numbers, *texts], default=4)
        elif name == "replace" and len(texts) >= 2:
            old = next(one for one in given if isinstance(one, (str, bytes)))
            size += _count(on, old) * texts[1]
        elif name == "format" and isinstance(on, (str, bytes)):
            self.formatted(on, given)
        self.text(size)

    def joined(self, items: list[Any], between: Any) -> None:
        """Items are about to be joined to one text."""
        self.step()
        self.text(sum(self.weight(one) for one in items) + len(items) * self.weight(between))


def _count(text: Any, part: Any) -> int:
    """How often `part` may be found; an empty one is between all characters."""
    try:
        return int(text.count(part)) if part else len(text) + 1
    except (AttributeError, TypeError):
        return 1
