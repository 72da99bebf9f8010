"""Values that nobody expects: of every type, of absurd sizes, and objects that raise wherever they are touched."""

from __future__ import annotations

import copy
import decimal
import enum
import functools
import itertools
import math
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

LONG = 5_000


class Raising:
    """An object that raises from whatever it is asked."""

    def _raise(self, *args, **named):
        raise RuntimeError("hands off")

    __repr__ = __str__ = __bool__ = __len__ = __iter__ = __eq__ = __hash__ = __fspath__ = __int__ = __float__ = _raise
    __index__ = __getattr__ = __contains__ = __getitem__ = __call__ = __format__ = _raise


class RaisingText(str):
    """A string that cannot be shown."""

    __slots__ = ()

    def __repr__(self):
        raise RuntimeError("hands off")

    __str__ = __format__ = __repr__


class Colour(enum.Enum):
    RED = "red"


def circle():
    found = []
    found.append(found)
    return found


def doubled():
    """A small object that is a billion values, followed through thirty levels."""
    found = ["a"]
    for _ in range(30):
        found = [found, found]
    return found


def thousandfold():
    """The same in three levels: its first million are counted forty times as fast."""
    found = "a"
    for _ in range(3):
        found = [found] * 1_000
    return found


NUMBERS = [0, 1, -1, 2**31, -(2**31), 2**63, 2**64, 10**30, 10**400, -(10**400)]
FLOATS = [0.0, 0.5, -0.5, 1.0, 1e300, -1e300, math.nan, math.inf, -math.inf, 5e-324]
TEXTS = [
    "",
    " ",
    "a",
    "\ud800",
    "a\udfff",
    "\0",
    "../..",
    "~nobody-of-this-name/x",
    "5",
    "true",
    "null",
    "é漢\U0001f600",
]
ODD = [
    lambda: None,
    lambda: True,
    lambda: 10**5000,  # more digits than Python prints
    lambda: [-(10**5000)],
    lambda: b"bytes",
    lambda: bytearray(b"bytes"),
    lambda: object(),
    lambda: int,
    lambda: len,
    lambda: Colour.RED,
    lambda: decimal.Decimal("1.5"),
    lambda: 1 + 2j,
    lambda: np.float32(1.5),
    lambda: np.int64(3),
    lambda: np.arange(3),
    lambda: np.array("a"),
    lambda: range(3),
    lambda: iter([1]),
    lambda: itertools.count(),
    lambda: ValueError("a"),
    lambda: Path("nowhere"),
    Raising,
    lambda: RaisingText("a"),
    circle,
    thousandfold,
    lambda: [Raising()],
    lambda: {"a": Raising()},
    lambda: "a" * LONG,
    lambda: "/" + "a" * 5_000,
    lambda: [1] * LONG,
    lambda: ["a"] * LONG,
    lambda: {str(at): at for at in range(LONG)},
    lambda: [{"role": "user", "content": "a"}] * LONG,
]

scalars = st.sampled_from(NUMBERS) | st.sampled_from(FLOATS) | st.sampled_from(TEXTS) | st.integers() | st.floats()
small = scalars | st.none() | st.booleans() | st.text(max_size=6) | st.binary(max_size=3)
keys = st.sampled_from(["role", "content", "type", "a", "\ud800", 0, 1, -1, None, True])
nested = st.recursive(
    small,
    lambda inside: (
        st.lists(inside, max_size=3)
        | st.tuples(inside, inside)
        | st.dictionaries(keys, inside, max_size=3)
        | st.frozensets(st.integers(), max_size=2)
    ),
    max_leaves=6,
)
EVERY = [*ODD, *(functools.partial(copy.copy, one) for one in (*NUMBERS, *FLOATS, *TEXTS))]
"""Makers of all that is named here: a fresh object each time, as some of them end when they are looked at."""
values = small | nested
"""What is drawn besides. None of ODD, which are slow: each test takes every one of them once."""
