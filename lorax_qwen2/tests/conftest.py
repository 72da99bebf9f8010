"""One thread for torch, as in every test process, and the installed plugins."""

from __future__ import annotations

import pytest
from house import one_thread, settle

from lorax_core.plugins.host import PluginHost
from lorax_core.settings import Settings

__all__ = ["one_thread"]

settle()


@pytest.fixture(scope="session")
def host() -> PluginHost:
    """The installed plugins, whatever LORAX_* variables say."""
    return PluginHost.discover(Settings())
