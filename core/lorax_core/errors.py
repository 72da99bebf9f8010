"""The one tree of errors.

Decides what an error says: what failed, the value that caused it, and what to do next. Knows nothing of what can fail.
Everything raised on purpose by lorax-core is a `LoraxError`; anything else that escapes is an internal error.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

LOAD_AGAIN: Final = "load an engine again: lorax_core.load(...)"
"""The hint of all errors about a closed engine."""


class LoraxError(Exception):
    """Base of every deliberate error.

    `message` says what failed and quotes the offending value; `hint` says what to do next (a command, a nearest valid
    value) and may be None. `str()` gives both. `http_hint` is what a client of a server can do, where `hint` is about Python.
    """

    def __init__(self, message: str, *, hint: str | None = None, http_hint: str | None = None) -> None:
        super().__init__(message)
        # Apart, for servers and commands that show the hint in a place of its own.
        self.message = message
        self.hint = hint
        self.http_hint = hint if http_hint is None else http_hint

    def __str__(self) -> str:
        # The hint on a line of its own: logs and tracebacks show str(), and none of it may be lost.
        return self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"


class PluginError(LoraxError):
    """A plugin is missing, broken, incompatible or in conflict with another."""


class CheckpointError(LoraxError):
    """A checkpoint folder is missing, corrupt, incomplete, or not for the architecture that it names."""


class AdapterError(LoraxError):
    """An adapter is unknown, corrupt, or does not fit the base model."""


class RequestError(LoraxError):
    """A request asks for something that no engine, or not this engine, can answer.

    `option` is the option of the request that is wrong, where it is one.
    """

    def __init__(
        self, message: str, *, hint: str | None = None, http_hint: str | None = None, option: str | None = None
    ) -> None:
        super().__init__(message, hint=hint, http_hint=http_hint)
        self.option = option


class WrongOption(ValueError):
    """What a validator of several options together raises, to say which of them is to be changed."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


class CapacityError(LoraxError):
    """A request is larger than the model, the KV cache or the machine.

    `option` is the option of the request that is to be smaller, where it is one.
    """

    def __init__(
        self, message: str, *, hint: str | None = None, http_hint: str | None = None, option: str | None = None
    ) -> None:
        super().__init__(message, hint=hint, http_hint=http_hint)
        self.option = option


class StepError(LoraxError):
    """Some requests of a call failed while others finished.

    `results` has one entry for each request of the call, in order: its result, or the error that ended it.
    """

    def __init__(
        self, message: str, *, results: list[Any], hint: str | None = None, http_hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint, http_hint=http_hint)
        self.results = results


def shown(value: object, limit: int = 80) -> str:
    """A value as an error quotes it: `repr`, cut; its type where `repr` fails, as of numbers with thousands of digits."""
    # Cut on the way: what lists in lists come to, printed, may be more than memory holds.
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 6, limit, limit, limit
    short.maxlist = short.maxtuple = short.maxset = short.maxfrozenset = short.maxdict = short.maxdeque = 8
    try:
        text = short.repr(value)
    except Exception:
        return f"<{type(value).__name__}>"
    # Half of a pair of surrogates would make the message one that cannot be printed.
    return text[:limit].encode("utf-8", "backslashreplace").decode()


def nearest(value: str, options: Iterable[str]) -> str | None:
    """The option most like `value`, or None when none is close."""
    # Below difflib's own 0.6 for short names, in which one wrong letter weighs much.
    found = difflib.get_close_matches(value, list(options), n=1, cutoff=0.5 if len(value) < 7 else 0.6)
    return found[0] if found else None


def listed(options: Iterable[str], limit: int = 8) -> str:
    """Options as prose for an error message: `'a', 'b' (and 3 more)`; `none` when empty."""
    quoted = [repr(option) for option in options]
    if not quoted:
        return "none"
    shown = ", ".join(quoted[:limit])
    return shown if len(quoted) <= limit else f"{shown} (and {len(quoted) - limit} more)"


def plain(error: BaseException) -> str:
    """What an error says; of pydantic's, the sentences that the authors of validators wrote, without its own around them."""
    # By name: pydantic is not needed to raise an error, and this module is imported first.
    if type(error).__name__ != "ValidationError" or not isinstance(error, ValueError):
        return str(error)
    items: list[dict[str, Any]] = getattr(error, "errors")()  # noqa: B009  # by name, too
    return "; ".join(": ".join(filter(None, (".".join(map(str, item["loc"])), sentence(item)))) for item in items)


def sentence(item: Mapping[str, Any]) -> str:
    """What was wrong with one field, of an item of pydantic's `ValidationError.errors()`."""
    # "Value error, " and "Assertion failed, " stand in front of what a validator raised.
    raised = item.get("ctx", {}).get("error") if item["type"] in ("value_error", "assertion_error") else None
    return str(raised if raised is not None else item["msg"])
