"""A running server, asked from the command line.

Decides how its address and key are given, how long an answer may take and how large it may be, and what is said when there is
none. Knows nothing of what is asked.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from lorax_core.errors import LoraxError, RequestError
from lorax_core.untrusted import unusable

SECONDS: Final = 60.0
"""How long a server may take for an answer, from its name being looked up to the last byte."""
_MOST_BYTES: Final = 16 * 2**20
_MOST_SAID: Final = 500
_Answer = tuple[int, bytes]
"""Status and body."""
_OURS: Final = "is it a server that `lorax serve` started?"


def keys_in(file: Path) -> list[str]:
    """The keys in a file, one a line; lines that start with # are comments. Raises RequestError where there is none."""
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except (OSError, UnicodeError) as error:
        # Not what the file holds.
        raise RequestError(
            f"the keys in {file} cannot be read: {type(error).__name__}", hint="give a text file with one key a line"
        ) from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise RequestError(f"{file} has no key", hint="write one a line, of 8 characters at least")
    return keys


def ask(url: str, path: str, key: str | None, *, seconds: float = SECONDS) -> dict[str, Any]:
    """The JSON object at `path` of the server at `url`. Raises RequestError for anything else, with the next step."""
    from http.client import HTTPException

    host = re.split("[/?#]", url.partition("://")[2] or url)[0]
    # Not what they are: errors end up in logs.
    if "@" in host:
        raise RequestError(
            "the address has a user or a password in it", hint="give --url http://HOST:PORT, and the key beside it"
        )
    # Others, such as file:, have no server.
    if not url.startswith(("http://", "https://")):
        raise RequestError(f"{url!r:.200} is no address of a server", hint="--url http://localhost:8000")
    if key is not None and not (key.isascii() and key.isprintable()):
        raise RequestError(
            "the key has characters that no header takes", hint="a key is one line of letters, digits and signs"
        )
    try:
        status, body = _within(seconds, lambda: _answer(url.rstrip("/") + path, key))
        if status == 200:
            found = _parsed(body)
    # ValueError: an address that is none, or no JSON.
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise RequestError(
            f"{url:.200} gives no answer that can be read: {str(reason)[:_MOST_SAID] or type(error).__name__}",
            hint="is `lorax serve` running there? curl URL/health",
        ) from error
    if status != 200:
        raise _refused(url, status, body)
    if not isinstance(found, dict):
        raise RequestError(f"{url:.200}{path} gives no JSON object", hint=_OURS)
    return found


def rows_of(url: str, found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The list of objects of that name in an answer. Raises RequestError where it is none."""
    rows = found.get(name)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RequestError(f"{url:.200} gives no list of {name}", hint=_OURS)
    return rows


def _answer(url: str, key: str | None) -> _Answer:
    from urllib import request
    from urllib.error import HTTPError

    class Stays(request.HTTPRedirectHandler):
        """The key is for this server alone."""

        def redirect_request(self, *_: Any) -> None:
            return None

    headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
    try:
        answer = request.build_opener(Stays).open(request.Request(url, headers=headers), timeout=SECONDS)
    except HTTPError as error:
        answer = error  # it is the answer, and holds the connection
    with answer:
        body = answer.read(_MOST_BYTES + 1)
    if len(body) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
    return answer.status, body


def _within(seconds: float, work: Callable[[], _Answer]) -> _Answer:
    """What `work` returns or raises; TimeoutError when it takes longer, which no timeout of a socket bounds."""
    done: list[_Answer] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            done.append(work())
        except Exception as error:
            failed.append(error)

    # A daemon: the process does not wait for it.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(f"it is not complete after {seconds:g} seconds")
    return done[0]


def _parsed(body: bytes) -> Any:
    """The JSON of an answer. Raises ValueError for what is none, or more deeply nested than anything of ours."""
    try:
        found = json.loads(body, parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    problem = unusable(found)
    if problem is not None:
        raise ValueError(f"it {problem}")
    return found


def _finite(number: str) -> float:
    found = float(number)
    if not math.isfinite(found):
        raise ValueError(f"{number:.40} is no number of JSON")
    return found


def _refused(url: str, status: int, body: bytes) -> LoraxError:
    """What the server says itself, where it says something."""
    try:
        said = _parsed(body)["error"]
        message, hint = str(said["message"]), said.get("hint")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, hint = f"status {status}", None
    if status in (401, 403):
        hint = "set LORAX_ADMIN_KEY or LORAX_API_KEYS, or give --admin-key-file FILE"
    if not isinstance(hint, str) or not hint:
        hint = _OURS
    return RequestError(f"{url:.200} refuses: {message:.{_MOST_SAID}}", hint=hint[:_MOST_SAID])
