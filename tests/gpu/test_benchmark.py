"""benchmarks/gpu.py at tiny size, on a CPU with FlashInfer's double: it runs whole and says what it measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fakes import with_backends
from gpu.doubles.backends import backends_on_cpu, declared

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def module_of(name, called):
    spec = importlib.util.spec_from_file_location(called, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[called] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark() -> Iterator[object]:
    """The script. Those beside it, which it imports by their bare names, are there while it is loaded alone."""
    called = {"engine": "engine", "adapters": "adapters", "gpu": "gpu_benchmark"}
    before = {name: sys.modules.get(name) for name in called.values()}
    modules = [module_of(name, wanted) for name, wanted in called.items()]
    for name, module in before.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module
    # dataclasses look their module up again
    sys.modules["gpu_benchmark"] = modules[-1]
    yield modules[-1]
    del sys.modules["gpu_benchmark"]


@pytest.fixture
def load(benchmark):
    """Enough to run every part once."""
    return benchmark.Load(
        dtype="float16",
        device="cpu",
        attention="flashinfer-on-cpu",
        rounds=1,
        batches=(1, 3),
        context=6,
        tokens=2,
        prompts=((2, 24), (1, 40)),
        adapters=(2, 4),
        adapted_rows=4,
        texts=3,
        text_tokens=20,
        copy_bytes=1 << 16,
        product=32,
        encoder="tiny",
    )


def test_every_part_is_measured_and_written(benchmark, load, host, tmp_path):
    path = tmp_path / "results/gpu.json"

    with backends_on_cpu():
        report = benchmark.Report(path, benchmark.facts(load))
        benchmark.measure(["tiny"], benchmark.PARTS, load, report, with_backends(host, declared("flashinfer")))

    found = json.loads(path.read_text("utf-8"))
    assert found["limits"].keys() == {"bytes_per_second", "operations_per_second"}
    for who in ("lorax", "transformers"):
        assert found[f"tiny, {who}"]["decode"].keys() == {"1", "3"}
        assert found[f"tiny, {who}"]["prompts"].keys() == {"2x24", "1x40"}
    assert found["tiny, lorax"]["adapters"].keys() == {"2 adapters, 4 rows", "4 adapters, 4 rows"}
    assert found["encoder"]["times_transformers"] > 0
    made_of = found["tiny, lorax"]["made_of"]
    assert made_of["attention"] == "flashinfer"
    assert made_of["lora_kernel"][0] != "none"
    assert found["versions"]["torch"] == torch.__version__
    assert found["load"]["dtype"] == "float16"


def test_what_was_measured_before_a_failure_is_in_the_file(benchmark, load, host, tmp_path):
    path = tmp_path / "gpu.json"

    with pytest.raises(benchmark.lorax.RequestError, match="no attention backend is called"):
        benchmark.measure(["tiny"], ["encoder"], load, benchmark.Report(path, {"card": "none"}), host)

    assert json.loads(path.read_text("utf-8")).keys() == {"card", "limits"}


def test_the_work_of_a_size_is_that_of_its_checkpoint(benchmark, tmp_path):
    model = benchmark.make_model("tiny", str(tmp_path / "model"), dtype=torch.float16)
    work = benchmark.Work("tiny", itemsize=2)

    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    assert work.layer_weights == matrices
    assert work.step_bytes(0, 0) == 2 * (matrices + model.lm_head.weight.numel())
    # keys and values of 3 rows with 10 tokens: 2 layers, one head of 64, 2 bytes
    assert work.step_bytes(3, 10) - work.step_bytes(0, 0) == 3 * 10 * 2 * 2 * 64 * 2


def test_operations_of_a_prompt_are_those_that_torch_counts(benchmark, tmp_path):
    from torch.utils.flop_counter import FlopCounterMode

    model = benchmark.make_model("tiny", str(tmp_path / "model"))
    work, length = benchmark.Work("tiny", itemsize=4), 32
    model.config._attn_implementation = "eager"

    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.model(torch.zeros(1, length, dtype=torch.long))

    # An eager mask computes both halves of the attention, of which the causal one counts.
    attention = work.prompt_operations(1, length) - 2 * work.layer_weights * length
    assert counter.get_total_flops() == work.prompt_operations(1, length) + attention


def test_a_step_is_what_further_tokens_cost(benchmark, load, monkeypatch):
    took = {2: 5.0, 4: 9.0}
    monkeypatch.setattr(benchmark, "seconds", lambda job, load: took[job()])

    assert benchmark.step_seconds(lambda rows, tokens: tokens, 8, load) == 2.0


def test_without_a_gpu_it_says_what_to_do(benchmark, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(SystemExit):
        benchmark.main(["--sizes", "tiny"])

    assert "torch sees no GPU; `--device cpu --sizes small`" in capsys.readouterr().err
