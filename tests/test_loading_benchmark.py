"""benchmarks/loading.py at tiny size: it measures every case, and tells what."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from builders import make_qwen2

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/loading.py"


@pytest.fixture(scope="module")
def loading():
    spec = importlib.util.spec_from_file_location("loading_benchmark", SCRIPT)
    module = sys.modules["loading_benchmark"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["loading_benchmark"]


@pytest.fixture(scope="module")
def found(loading, tmp_path_factory):
    """All cases, here and not each in a process of its own."""
    folder = make_qwen2(tmp_path_factory.mktemp("model"), tie_word_embeddings=True)
    return loading.measure(str(folder), 1, run=loading.in_this_process)


def test_every_case_is_measured_beside_reading_and_transformers(loading, found):
    assert found["cases"].keys() == loading.CASES.keys()
    for one in found["cases"].values():
        seconds = one["load"] + one["first_token"]
        assert one["times_read"] == pytest.approx(seconds / found["read"]["again"])
    ours, theirs = found["cases"]["lorax bfloat16"], found["cases"]["transformers bfloat16"]
    both = [one["load"] + one["first_token"] for one in (theirs, ours)]
    assert ours["times_transformers"] == pytest.approx(both[0] / both[1])


def test_weights_are_counted_once_and_as_they_are_computed_with(found):
    whole, half, eight, four = (
        found["cases"][f"lorax {how}"]["weight_bytes"] for how in ("float32", "bfloat16", "int8", "int4")
    )
    assert whole == pytest.approx(found["cases"]["transformers float32"]["weight_bytes"], rel=0.1)
    assert half == pytest.approx(whole / 2, rel=0.1)
    assert four < eight < half


def test_the_table_has_a_row_for_each_case(loading, found, capsys):
    loading.show(found)

    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("│ lorax", "│ transf"))]
    assert len(rows) == len(loading.CASES)


def test_a_case_runs_in_a_process_of_its_own(loading, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(5000))

    assert loading.in_new_process("read", str(tmp_path))["bytes"] == 5000
