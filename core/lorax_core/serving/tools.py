"""Tools that a model may call, and its calls, written as the Hermes and Qwen families write them.

Decides what describes a tool, which grammar makes calls of them, and which text is a call:
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. Knows nothing of templates, which show tools to a model, or
of engines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

TOOLS: Final = 128
OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"
SPACED: Final = {"x-guidance": {"whitespace_pattern": r"[ ]|\n {0,16}"}}
"""Of a schema: between two tokens of JSON is a blank, or a new line and its indentation. Unbounded, a model may write blanks
until it has no tokens left, which is as valid."""
CHOICES: Final = ("none", "auto", "required")
"""What may be chosen instead of a tool, so no tool is called so."""
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")


def check_tools(tools: Sequence[Any]) -> None:
    """Raises ValueError for what describes no tools: `{"type": "function", "function": {"name", "parameters", ...}}`."""
    if not 0 < len(tools) <= TOOLS:
        raise ValueError(f"1 to {TOOLS} tools, or leave them out")
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict):
            raise ValueError('a tool is {"type": "function", "function": {"name": ...}}')
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in CHOICES:
            raise ValueError(
                "the name of a tool has 1 to 128 letters, digits, '_', '-' and '.', and is none of its choices"
            )
        if parameters is not None and (
            not isinstance(parameters, dict) or parameters.get("type", "object") != "object"
        ):
            raise ValueError(f'the parameters of tool {name!r} are a JSON schema of "type": "object"')
    names = names_of(tools)
    if len(set(names)) < len(names):
        raise ValueError("two tools have the same name")


def names_of(tools: Sequence[dict[str, Any]]) -> list[str]:
    """The names of tools, in their order."""
    return [tool["function"]["name"] for tool in tools]


def constrain(tools: Sequence[dict[str, Any]], choice: str) -> bool:
    """Whether a completion that calls tools as `choice` has it needs a grammar, even where it is free otherwise."""
    return choice != "auto" or any(tool["function"].get("strict") for tool in tools)


def grammar_of(
    tools: Sequence[dict[str, Any]], choice: str, answer: str | None, *, parallel: bool, own: Mapping[str, int]
) -> str:
    """A Lark grammar of completions that call tools as `choice` has it.

    With "auto" the completion is calls or an answer after the schema `answer`; without one it is text, in which the calls of
    tools that are `strict` follow their schema. `own` are texts that are tokens of their own, which no other token may spell.
    """
    rules = [_call_rules(tools, choice, answer), f'close: "\\n" {_marked(CLOSE, own)}']
    several = parallel and choice in ("auto", "required")
    calls = 'calls: tagged ("\\n" tagged)*' if several else "calls: tagged"
    if choice != "auto" or answer is not None:
        rules += [calls, f'tagged: {_marked(OPEN, own)} "\\n" call close']
        rules.append("start: calls" if choice != "auto" else f"start: calls | answer\nanswer: %json {answer}")
        return _lark(rules)
    others = ",".join(str(token) for text, token in own.items() if text != OPEN)
    rules += ["TEXT: /(.|\\n)*/", f"text: TEXT (<[{others}]> TEXT)*" if others else "text: TEXT"]
    if OPEN in own:
        rules.append(f'tagged: text {_marked(OPEN, own)} "\\n" call close')
    else:  # lazy: the text ends where the first call begins
        before = f"(TEXT <[{others}]>)* " if others else ""
        rules += [f'head[lazy]: TEXT "{OPEN}"', f'tagged: {before}head "\\n" call close']
    rules.append(f"start: tagged{'*' if several else '?'} text")
    return _lark(rules)


def _call_rules(tools: Sequence[dict[str, Any]], choice: str, answer: str | None) -> str:
    """The rule `call`: what is between the marks."""
    rules = []
    for at, tool in enumerate(tools):
        function = tool["function"]
        # What is not strict is up to the model where the model itself chose to call.
        bound = choice != "auto" or answer is not None or function.get("strict")
        schema = {"type": "object", **((function.get("parameters") or {}) if bound else {}), **SPACED}
        opening = json.dumps(f'{{"name": {json.dumps(function["name"])}, "arguments": ')
        rules.append(f'call_{at}: {opening} arguments_{at} "}}"\narguments_{at}: %json {json.dumps(schema)}')
    named = [at for at, name in enumerate(names_of(tools)) if choice in ("auto", "required", name)]
    return "\n".join([*rules, "call: " + " | ".join(f"call_{at}" for at in named)])


def _marked(mark: str, own: Mapping[str, int]) -> str:
    return f"<[{own[mark]}]>" if mark in own else json.dumps(mark)


def _lark(rules: list[str]) -> str:
    return "%llguidance {}\n" + "\n".join(rules) + "\n"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model made; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


class CallReader:
    """Reads text that comes piece by piece: gives what is text as text, and calls of the tools `names` as `ToolCall`s.

    What may be the beginning of a call is held back. What turns out to be none stays text, and blanks around calls are dropped.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._held = ""  # begins with OPEN while `_inside`
        self._inside = False
        self._from = 0  # where in `_held` the next CLOSE may be
        self._blank = ""
        self.calls = 0
        """How many were read so far."""

    def push(self, text: str) -> list[str | ToolCall]:
        """What is known now that `text` came."""
        self._held += text
        found: list[str | ToolCall] = []
        while self._step(found):
            pass
        return found

    def finish(self) -> list[str | ToolCall]:
        """What is left once no more text will come: a call needs no CLOSE then, as a stop string may have been it."""
        found: list[str | ToolCall] = []
        call = self._call(self._held[len(OPEN) :]) if self._inside else None
        if isinstance(call, ToolCall):
            self._add(call, found)
        else:
            self._say(self._held, found)
        if self._blank and not self.calls:
            found.append(self._blank)
        self._held, self._blank, self._inside = "", "", False
        return found

    def _step(self, found: list[str | ToolCall]) -> bool:
        """Take one thing off `_held`; whether there may be more."""
        if not self._inside:
            at = self._held.find(OPEN)
            # Without one, the end of the text may be the beginning of one.
            keep = at if at >= 0 else len(self._held) - _overlap(self._held)
            self._say(self._held[:keep], found)
            self._held = self._held[keep:]
            self._inside, self._from = at >= 0, len(OPEN)
            return self._inside
        body = self._held[len(OPEN) : len(OPEN) + 100].lstrip()
        if body and body[0] != "{":
            return self._release(len(OPEN), found)
        end = self._held.find(CLOSE, self._from)
        if end < 0:
            self._from = max(self._from, len(self._held) - len(CLOSE) + 1)
            return False
        call = self._call(self._held[len(OPEN) : end])
        if call is None:
            return self._release(end + len(CLOSE), found)
        if isinstance(call, ToolCall):
            self._add(call, found)
            self._held, self._inside = self._held[end + len(CLOSE) :], False
        else:  # it lies in a string that goes on
            self._from = end + 1
        return True

    def _release(self, length: int, found: list[str | ToolCall]) -> bool:
        self._say(self._held[:length], found)
        self._held, self._inside = self._held[length:], False
        return True

    def _add(self, call: ToolCall, found: list[str | ToolCall]) -> None:
        self._blank = ""
        self.calls += 1
        found.append(call)

    def _say(self, text: str, found: list[str | ToolCall]) -> None:
        whole = self._blank + text
        shown = whole.rstrip()
        self._blank = whole[len(shown) :]
        if shown:
            found.append(shown)

    def _call(self, text: str) -> ToolCall | str | None:
        """The call that a text is; None where it is none, and the text itself where it ends within a string."""
        try:
            read = json.loads(text, parse_constant=_no_json)
        except json.JSONDecodeError as error:
            return text if error.msg.startswith("Unterminated string") else None
        except (RecursionError, ValueError):  # too deep, or a number of too many digits
            return None
        name = read.get("name") if isinstance(read, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return None
        arguments = read.get("arguments", {})
        return ToolCall(name, _written(arguments)) if isinstance(arguments, dict) else None


def _no_json(name: str) -> None:
    """For NaN and infinities, which Python reads and JSON has not."""
    raise ValueError(name)


def _written(arguments: dict[str, Any]) -> str:
    """Arguments as JSON; escaped, where half of a pair of surrogates is in them, which no text can hold."""
    text = json.dumps(arguments, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(arguments)
    return text


def _overlap(text: str) -> int:
    """The length of the longest end of a text with which OPEN begins."""
    return next((size for size in range(min(len(OPEN) - 1, len(text)), 0, -1) if OPEN.startswith(text[-size:])), 0)
