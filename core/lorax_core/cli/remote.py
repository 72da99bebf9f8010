"""A running server, asked from the command line.

Decides how its address and key are given, how long an answer may take, and what is said when there is none. Knows nothing of
what is asked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from lorax_core.errors import LoraxError, RequestError

SECONDS: Final = 30.0
"""How long a server may take for each part of its answer."""
_MOST_BYTES: Final = 16 * 2**20


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


def ask(url: str, path: str, key: str | None) -> dict[str, Any]:
    """The JSON object at `path` of the server at `url`. Raises RequestError for anything else, with the next step."""
    from http.client import HTTPException
    from urllib import request
    from urllib.error import HTTPError, URLError

    class Stays(request.HTTPRedirectHandler):
        """The key is for this server alone."""

        def redirect_request(self, *_: Any) -> None:
            return None

    # Others, such as file:, have no server.
    if not url.startswith(("http://", "https://")):
        raise RequestError(f"{url!r} is no address of a server", hint="--url http://localhost:8000")
    headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
    try:
        asked = request.Request(url.rstrip("/") + path, headers=headers)
        with request.build_opener(Stays).open(asked, timeout=SECONDS) as answer:
            found = json.loads(answer.read(_MOST_BYTES))
    except HTTPError as error:
        with error:  # it is the answer, and holds the connection
            body = error.read(_MOST_BYTES)
        raise _refused(url, error.code, body) from error
    # ValueError: an address that is none, or no JSON.
    except (URLError, OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise RequestError(
            f"{url} gives no answer that can be read: {reason}", hint="is `lorax serve` running there? curl URL/health"
        ) from error
    if not isinstance(found, dict):
        raise RequestError(f"{url}{path} gives no JSON object", hint="is it a server that `lorax serve` started?")
    return found


def _refused(url: str, status: int, body: bytes) -> LoraxError:
    """What the server says itself, where it says something."""
    try:
        said: Any = json.loads(body)["error"]
        message, hint = str(said["message"]), said.get("hint")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, hint = f"status {status}", None
    if status in (401, 403):
        hint = "set LORAX_ADMIN_KEY, or give --admin-key-file FILE"
    return RequestError(f"{url} refuses: {message}", hint=hint or "is it a server that `lorax serve` started?")
