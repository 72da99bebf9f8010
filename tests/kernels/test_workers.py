"""Workers of OpenMP end with `end_workers`, and an engine's caller keeps none."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from builders import make_bert

import lorax_core
from lorax_core.kernels.workers import end_workers


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    end_workers()
    torch.set_num_threads(before)


def tasks():
    return len(os.listdir("/proc/self/task"))


def settled(expected, seconds=10):
    """Whether the process comes to so many threads: the system takes a moment to remove one that ended."""
    end = time.monotonic() + seconds
    while tasks() != expected and time.monotonic() < end:
        os.sched_yield()
    return tasks() == expected


def compute():
    return torch.ones(1 << 20).exp().sum().item()


def test_workers_end_and_come_back_with_the_next_loop(three_threads):
    end_workers()
    before = tasks()
    assert settled(before)
    expected = compute()
    assert tasks() == before + 2

    assert end_workers() is True

    assert settled(before)
    assert compute() == expected
    assert tasks() == before + 2


def test_workers_of_other_threads_stay(three_threads):
    ready, done = threading.Event(), threading.Event()

    def run():
        compute()
        ready.set()
        done.wait()

    other = threading.Thread(target=run)
    end_workers()
    before = tasks()
    other.start()
    ready.wait()
    compute()
    end_workers()

    assert settled(before + 3)
    done.set()
    other.join()


def test_a_caller_keeps_no_workers_while_its_engine_computes(three_threads, tmp_path):
    with lorax_core.load(make_bert(tmp_path), dtype="float32") as engine:
        engine.embed(["ab"])
        compute()
        with_own = tasks()

        engine.embed(["ab"])

        assert settled(with_own - 2)


FORKS = """
import os, signal, torch
import lorax_core.kernels.workers
torch.set_num_threads(2)
torch.ones(1 << 20).exp()
child = os.fork()
if not child:
    signal.alarm(20)
    os._exit(0 if torch.ones(1 << 20).exp().sum() > 0 else 1)
raise SystemExit(os.waitpid(child, 0)[1])
"""


def test_a_forked_child_can_compute_though_its_parent_had():
    ended = subprocess.run([sys.executable, "-c", FORKS], check=False, timeout=60)

    assert ended.returncode == 0
