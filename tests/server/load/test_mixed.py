"""`benchmarks/serving.py` on a small model: a crowd of clients over all tasks and eight adapters, for five seconds."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest

import lorax_core

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"
SMALL = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": 300}


@pytest.fixture(scope="module")
def serving():
    spec = importlib.util.spec_from_file_location("benchmark_serving", FOLDER / "serving.py")
    module = sys.modules["benchmark_serving"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["benchmark_serving"]


def test_a_crowd_over_all_tasks_loses_no_request_and_leaves_no_page(serving, tmp_path):
    checkpoint = serving.make_checkpoint(tmp_path / "model", **SMALL)
    adapters = serving.make_adapters(checkpoint, tmp_path)
    given = argparse.Namespace(clients=56, seconds=5.0, rounds=1)

    with lorax_core.load(checkpoint, adapters=adapters, kv_cache_tokens=8_192, max_batch_rows=48) as engine:
        found = serving.measure(engine, given, [])
        alive = len(engine._worker._stepper.loop.scheduler)

    assert found["lost"] == {}
    assert (found["pages_left"], alive) == (0, 0)
    assert found["answered"] > 100
    assert found["first_token_ms"]["p50"] > 0
