"""Who may ask.

Decides which keys open which routes, in a time that says nothing about the keys. Knows nothing of what routes do.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import Final

from pydantic import SecretStr

from lorax_core.server.errors import Refused

OPEN: Final = frozenset({"/health", "/ready", "/tei/health"})
"""Routes that need no key: probes of an orchestrator have none."""
ADMIN: Final = ("/v1/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""Routes below these need the admin key."""


class ApiKeys:
    """The keys of one server. Only their digests are kept."""

    def __init__(self, keys: Iterable[SecretStr] = (), admin: SecretStr | None = None) -> None:
        self._keys = [_digest(key.get_secret_value()) for key in keys]
        self._admin = None if admin is None else _digest(admin.get_secret_value())

    def check(self, method: str, path: str, authorization: str | None) -> None:
        """Raises Refused (401) when a request with this `Authorization` header may not ask for this path."""
        admin = is_admin(path)
        if admin and self._admin is None:
            raise Refused(
                "no_route",
                "adapters cannot be loaded over HTTP: the server has no admin key",
                hint="start it with LORAX_ADMIN_KEY set, or with --admin-key-file",
            )
        # The page itself says nothing; what it then asks for needs the key that is typed into it.
        page = path == "/" and method in ("GET", "HEAD")
        if path in OPEN or page or not (admin or self._keys):
            return
        given = _digest(_bearer(authorization))
        allowed = [*self._keys, *([] if self._admin is None else [self._admin])] if not admin else [self._admin or b""]
        # Each is compared, whatever the ones before gave.
        if not sum(hmac.compare_digest(given, key) for key in allowed):
            what = "the admin key" if admin else "an API key"
            raise Refused(
                "unauthorized",
                f"this route needs {what}, and "
                + ("another key came" if authorization else "no Authorization header came"),
                hint="send the header 'Authorization: Bearer KEY'",
            )


def is_admin(path: str) -> bool:
    """Whether a path is one of those that change what is served."""
    return any(path == route or path.startswith(f"{route}/") for route in ADMIN)


def _bearer(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _digest(key: str) -> bytes:
    # Digests have one length, so that comparing takes the same time for keys of any.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
