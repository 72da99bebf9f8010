"""A running server, asked from the command line.

Decides how its address and key are given, how long an answer may take and how large it may be, what is said when there is
none, and how a streamed answer is read. Knows nothing of what is asked.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lorax_core.errors import LoraxError, RequestError
from lorax_core.untrusted import unusable

if TYPE_CHECKING:
    from http.client import HTTPResponse
    from urllib.error import HTTPError

SECONDS: Final = 60.0
"""How long a server may take for an answer, from its name being looked up to the last byte."""
_MOST_BYTES: Final = 16 * 2**20
_EVENT_BYTES: Final = 2**20
_MOST_SAID: Final = 500
_LOOPBACK: Final = re.compile(r"localhost|127\.[\d.]+")
_Answer = tuple[int, bytes]
"""Status and body."""
_LISTS: Final = ("/v1/adapters", "/stats")
"""Where the adapters of a server are listed: for its admin key, and for any of its keys."""
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


def admin_key_in(file: Path) -> str:
    """The one key in a file. Raises RequestError where there are more: the others would open nothing."""
    key, *others = keys_in(file)
    if others:
        raise RequestError(f"{file} has {len(others) + 1} keys, and the admin key is one", hint="leave one in it")
    return key


def root_of(url: str) -> str:
    """The address that routes are added to. Clients of OpenAI are given it with /v1."""
    return url.rstrip("/").removesuffix("/v1")


def ask(
    url: str, path: str, key: str | None, *, body: Mapping[str, Any] | None = None, seconds: float = SECONDS
) -> dict[str, Any]:
    """The JSON object at `path` of the server at `url`; `body` is posted to it. Raises RequestError for anything else."""
    from http.client import HTTPException

    _check(url, key)
    try:
        status, answer = _within(seconds, lambda: _whole(_open(url, path, key, body, SECONDS)))
        if status == 200:
            found = _parsed(answer)
    # ValueError: an address that is none, or no JSON.
    except (OSError, ValueError, HTTPException) as error:
        raise _unreadable(url, error) from error
    if status != 200:
        raise _refused(url, status, answer, _keys(path, key))
    if not isinstance(found, dict):
        raise RequestError(f"{url:.200}{path} gives no JSON object", hint=_OURS)
    return found


def events(
    url: str, path: str, key: str | None, body: Mapping[str, Any], *, silence: float = SECONDS
) -> Iterator[dict[str, Any]]:
    """The events of the streamed answer to `body`, as they come. Closing the iterator closes the connection.

    `silence` is how many seconds the server may say nothing. Raises RequestError for a server that refuses, an error in the
    stream, and a stream that breaks off, which are those that do not end with `[DONE]`.
    """
    from http.client import HTTPException, IncompleteRead

    _check(url, key)
    try:
        with _open(url, path, key, body, silence) as answer:
            status = answer.status or 0
            if status != 200:
                raise _refused(url, *_within(SECONDS, lambda: _whole(answer)), _keys(path, key))
            if "json" in answer.headers.get("Content-Type", ""):
                raise ValueError("it is not a stream")
            for text in _data(answer):
                if text == b"[DONE]":
                    return
                found = _parsed(text)
                if not isinstance(found, dict):
                    raise ValueError("an event is not a JSON object")
                if found.get("error") is not None:
                    raise _refused(url, status, text, _keys(path, key))
                yield found
    except IncompleteRead:
        pass  # as one that ends too soon
    except (OSError, ValueError, HTTPException) as error:
        raise _unreadable(url, error) from error
    raise RequestError(f"{url:.200}: the answer broke off", hint="the log of the server says why; ask again")


def rows_of(url: str, found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The list of objects of that name in an answer. Raises RequestError where it is none."""
    rows = found.get(name)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RequestError(f"{url:.200} gives no list of {name}", hint=_OURS)
    return rows


def _check(url: str, key: str | None) -> None:
    """Raises RequestError for what is no address, or no key."""
    host = re.split("[/?#]", url.partition("://")[2] or url)[0]
    # Not what they are: errors end up in logs.
    if "@" in host:
        raise RequestError(
            "the address has a user or a password in it",
            hint="give http://HOST:PORT alone; keys come from LORAX_API_KEYS or LORAX_ADMIN_KEY",
        )
    # Others, such as file:, have no server.
    if not url.startswith(("http://", "https://")):
        raise RequestError(
            f"{url!r:.200} is not the address of a server", hint="it begins with http://, such as http://localhost:8000"
        )
    if key is not None and not (key.isascii() and key.isprintable()):
        raise RequestError(
            "the key has characters that no header takes", hint="a key is one line of letters, digits and signs"
        )


def _open(
    url: str, path: str, key: str | None, body: Mapping[str, Any] | None, timeout: float
) -> HTTPResponse | HTTPError:
    """The answer, of which the head was read. `timeout` is of each wait for a part of it."""
    from urllib import request
    from urllib.error import HTTPError

    class Stays(request.HTTPRedirectHandler):
        """The key is for this server alone."""

        def redirect_request(self, *_: Any) -> None:
            return None

    headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
    sent = None
    if body is not None:
        headers["Content-Type"] = "application/json"
        sent = json.dumps(body).encode()
    asked = request.Request(url.rstrip("/") + path, sent, headers)
    # What is said to this machine is no proxy's business.
    here = request.ProxyHandler({} if _LOOPBACK.fullmatch(asked.host.partition(":")[0]) else None)
    try:
        found: HTTPResponse = request.build_opener(Stays, here).open(asked, timeout=timeout)
    except HTTPError as error:
        return error  # it is the answer, and holds the connection
    return found


def _whole(answer: HTTPResponse | HTTPError) -> _Answer:
    with answer:
        body = answer.read(_MOST_BYTES + 1)
    if len(body) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
    return answer.status or 0, body


def _data(answer: HTTPResponse | HTTPError) -> Iterator[bytes]:
    """What stands behind each `data:`. Of ours, and of those that are like it, an event has one."""
    while line := answer.readline(_EVENT_BYTES + 1):
        if len(line) > _EVENT_BYTES:
            raise ValueError(f"an event has more than {_EVENT_BYTES:,} bytes")
        # Half a line is the end of a stream that broke off.
        if line.startswith(b"data:") and line.endswith(b"\n") and (text := line[5:].strip()):
            yield text


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


def _unreadable(url: str, error: Exception) -> RequestError:
    reason = getattr(error, "reason", error)
    return RequestError(
        f"{url:.200} gives no answer that can be read: {str(reason)[:_MOST_SAID] or type(error).__name__}",
        hint="is `lorax serve` running there? curl URL/health",
    )


def _finite(number: str) -> float:
    found = float(number)
    if not math.isfinite(found):
        raise ValueError(f"{number:.40} is not a JSON number")
    return found


def _keys(path: str, key: str | None) -> str:
    """What to do when the server asks for a key, or for another one."""
    if path in _LISTS:
        return "set LORAX_ADMIN_KEY or LORAX_API_KEYS, or give --admin-key-file FILE"
    if key is not None:
        return "the server does not know the first key of LORAX_API_KEYS: set one of its keys"
    return "set LORAX_API_KEYS to one of the server's keys"


def _refused(url: str, status: int, body: bytes, keys: str) -> LoraxError:
    """What the server says itself, where it says something."""
    try:
        said = _parsed(body)["error"]
        # Other servers have a text there.
        message, hint = (said, None) if isinstance(said, str) else (str(said["message"]), said.get("hint"))
    except (ValueError, KeyError, TypeError, AttributeError):
        message, hint = f"status {status}", None
        # Not followed: the key is for the server that was named.
        if 300 <= status < 400:
            message, hint = f"status {status}, which sends elsewhere", "give the address that it sends to: curl -i URL"
    if status in (401, 403):
        hint = keys
    if not isinstance(hint, str) or not hint:
        hint = _OURS
    return RequestError(f"{url:.200} refuses: {message:.{_MOST_SAID}}", hint=hint[:_MOST_SAID])
