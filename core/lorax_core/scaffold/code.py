"""Python as people write it, from values: literals, calls and lists that fit a line of 120 or are broken as ruff breaks them.

Knows nothing of what is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

WIDTH: Final = 120


def literal(value: Any, indent: int = 0, before: int = 0) -> str:
    """A value in Python, on one line where it fits behind `before` characters, else broken and indented by `indent`."""
    line = _line(value)
    if len(line) + before + 1 <= WIDTH or not isinstance(value, dict | list | tuple):
        return line
    pad, inner = " " * indent, " " * (indent + 4)
    if isinstance(value, Mapping):
        keyed = [(f"{json.dumps(key)}: ", one) for key, one in value.items()]
        lines = [f"{inner}{key}{literal(one, indent + 4, indent + 4 + len(key))}," for key, one in keyed]
        return "\n".join(["{", *lines, f"{pad}}}"])
    start, end = "[]" if isinstance(value, list) else "()"
    return "\n".join([start, *(f"{inner}{literal(one, indent + 4, indent + 4)}," for one in value), f"{pad}{end}"])


def call(head: str, arguments: Iterable[str], indent: int = 0, tail: str = "") -> str:
    """`head(arguments)tail`, on one line or with one argument a line."""
    arguments = list(arguments)
    pad, inner = " " * indent, " " * (indent + 4)
    line = f"{pad}{head}({', '.join(arguments)}){tail}"
    if len(line) <= WIDTH and "\n" not in line:
        return line
    middle = f"{inner}{', '.join(arguments)}"
    if len(middle) <= WIDTH and "\n" not in middle:
        return "\n".join([f"{pad}{head}(", middle, f"{pad}){tail}"])
    return "\n".join([f"{pad}{head}(", *(f"{inner}{one}," for one in arguments), f"{pad}){tail}"])


def raised(text: str, indent: int) -> list[str]:
    """The lines of `raise ValueError(f"text")`."""
    pad = " " * indent
    line = f'{pad}raise ValueError(f"{text}")'
    if len(line) <= WIDTH:
        return [line]
    inner, lines = " " * (indent + 4), [""]
    # Braces hold code, which is not broken.
    for word in re.split(r" (?![^{]*\})", text):
        if len(lines[-1]) + len(word) + len(inner) + 4 > WIDTH:
            lines.append("")
        lines[-1] += f"{word} "
    lines[-1] = lines[-1].rstrip()
    quoted = [f'{inner}{"f" if "{" in one else ""}"{one}"' for one in lines]
    return [f"{pad}raise ValueError(", *quoted, f"{pad})"]


def imported(module: str, names: Iterable[str]) -> str:
    """`from module import names`, sorted as ruff sorts them."""
    names = sorted(set(names), key=_order)
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"from {module} import (", *(f"    {name}," for name in names), ")"])


def _order(name: str) -> tuple[int, str]:
    # Constants, then classes, then functions; case counts only between them.
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    return kind, name


def _line(value: Any) -> str:
    match value:
        case str():
            return json.dumps(value, ensure_ascii=False)
        case dict():
            return "{" + ", ".join(f"{_line(key)}: {_line(one)}" for key, one in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(_line, value)) + "]"
        case tuple():
            inside = ", ".join(map(_line, value))
            return f"({inside},)" if len(value) == 1 else f"({inside})"
    return repr(value)
