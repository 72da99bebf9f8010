"""How every test process, and each that it starts, behaves: one thread for torch, one profile for hypothesis.

A conftest takes both with `from house import one_thread, settle`, and calls `settle()`. Torch is not imported here: some
tests have no use for it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest
from hypothesis import HealthCheck, settings


def settle() -> None:
    """The same examples in every run, without a clock: a slow machine must not change what is found."""
    settings.register_profile(
        "house",
        derandomize=True,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("house")
    # For processes that tests start: several at once with all cores each would mostly wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Started in the background of a shell, a process ignores Ctrl-C, and so do those that it starts.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The machine is shared, and a sum in another order is another number."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
