"""What every test here may rely on: where the repository is, that no LORAX_* variable from outside steers it, and the tiny
checkpoints that many tests only read.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from house import one_thread, settle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forked import ForkedLorax
    from hubs import Hub

    from lorax_core.plugins.host import PluginHost

__all__ = ["one_thread"]

settle()


def pytest_collection() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    """What is imported and collected stays until the end: looking at a million objects again and again takes long."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LORAX_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def host() -> PluginHost:
    """The installed plugins."""
    from lorax_core.plugins.host import PluginHost
    from lorax_core.settings import Settings

    return PluginHost.discover(Settings())


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2 with a tokenizer of bytes. Tests that change files make their own."""
    from builders import make_qwen2

    return make_qwen2(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT with a tokenizer of letters, without sentence-transformers files."""
    from builders import make_bert

    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def forked() -> Iterator[ForkedLorax]:
    """A `lorax` that starts in a moment, because it is forked from a process that has imported torch."""
    from forked import ForkedLorax

    with ForkedLorax() as lorax:
        yield lorax


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub of models and adapters on this machine, empty."""
    from hubs import Hub

    hub = Hub()
    yield hub
    hub.close()
