"""Servers on loopback, and clients of other projects in an environment of their own (`make test-clients` makes it)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from loopback import listening

import lorax_core

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lorax_core.serving.engine import Engine

ENVIRONMENT = "LORAX_TEST_CLIENTS"
"""Names another environment that has the clients."""
_HERE = Path(__file__).parent
_FOLDER = Path(os.environ.get(ENVIRONMENT, sys.prefix + "/clients"))


@pytest.fixture(scope="session")
def qwen2(repository: Path) -> Iterator[Engine]:
    """A small model that generates, with two adapters."""
    folder = repository / "examples/tiny_qwen2"
    adapters = {name: folder / "adapters" / name for name in ("upper", "bullets")}
    with lorax_core.load(folder / "model", adapters=adapters, kv_cache_tokens=4_096, adapter_sources=[]) as engine:
        yield engine


@pytest.fixture(scope="session")
def url(qwen2: Engine) -> Iterator[str]:
    """Where the small model is served."""
    with listening(qwen2) as address:
        yield address


@pytest.fixture(scope="session")
def client() -> Iterator[Callable[..., dict[str, Any]]]:
    """Calls another project's client: `client(url, method, **arguments)` gives what it found, or its error."""
    python = _FOLDER / "bin/python"
    process = subprocess.Popen(
        [python, _HERE / "driver.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_HERE
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def call(url: str, method: str, *, asynchronous: bool = False, **arguments: Any) -> dict[str, Any]:
        asked = {"url": url, "method": method, "asynchronous": asynchronous, "arguments": arguments}
        print(json.dumps(asked), file=process.stdin, flush=True)
        said: dict[str, Any] = json.loads(process.stdout.readline())
        return said

    yield call
    process.stdin.close()
    process.stdout.close()
    process.wait()
