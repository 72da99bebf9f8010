"""Engines and servers that tests here only read from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

import lorax_core
from lorax_core.server.app import build_app
from lorax_core.server.options import ServerOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fastapi import FastAPI

    from lorax_core.serving.engine import Engine


@pytest.fixture(scope="module")
def qwen2(repository: Path) -> Iterator[Engine]:
    """A small model that generates, with a chat template, as examples/ has it."""
    with lorax_core.load(repository / "examples/tiny_qwen2/model", kv_cache_tokens=4_096) as engine:
        yield engine


@pytest.fixture(scope="module")
def client() -> Callable[..., httpx.AsyncClient]:
    """A client of an engine's application, without a socket between. Tests of one module share an application."""
    made: dict[tuple[Engine, str], FastAPI] = {}

    def make(engine: Engine, **options: object) -> httpx.AsyncClient:
        key = (engine, repr(sorted(options.items())))
        if key not in made:  # making one takes longer than most answers
            made[key] = build_app(engine, ServerOptions(**options), model_name="base")
        transport = httpx.ASGITransport(app=made[key], raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://server")

    return make
