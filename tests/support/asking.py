"""One request to an application that is called without a socket.

Decides nothing.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx


def ask(client: httpx.AsyncClient, method: str, path: str, **options: Any) -> httpx.Response:
    """The answer; the client is closed."""

    async def inside() -> httpx.Response:
        async with client:
            return await client.request(method, path, **options)

    return asyncio.run(inside())
