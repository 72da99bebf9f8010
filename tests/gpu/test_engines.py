"""Whole engines with each backend, over the doubles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import make_qwen2
from fakes import with_backends
from gpu.doubles.backends import BACKENDS, backends_on_cpu, declared

import lorax_core as lorax

PROMPTS = [list(range(20)), [5], list(range(40, 100)), [9, 8, 7]]


@pytest.fixture(scope="module", autouse=True)
def _on_cpu() -> Iterator[None]:
    with backends_on_cpu():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny Qwen2 with heads of 64, one of its layers with a window."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    return make_qwen2(tmp_path_factory.mktemp("heads-of-64"), **sizes, **window)


def answers(engine):
    results = engine.generate(PROMPTS, max_tokens=12)
    return [result.token_ids for result in results]


def loaded(checkpoint, host, attention, **options):
    host = with_backends(host, *map(declared, BACKENDS))
    return lorax.load(checkpoint, host=host, attention=attention, dtype="float16", kv_cache_tokens=2048, **options)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 16}], ids=["whole prompts", "chunks"])
def test_an_engine_answers_as_with_the_torch_backend(host, checkpoint, name, options):
    with loaded(checkpoint, host, f"{name}-on-cpu", **options) as engine, loaded(checkpoint, host, "torch") as oracle:
        assert engine.info().attention == BACKENDS[name].name

        assert answers(engine) == answers(oracle)


def test_an_8_bit_cache_answers_as_with_the_torch_backend(host, checkpoint):
    options = {"kv_dtype": "fp8_e4m3"}
    with (
        loaded(checkpoint, host, "flashinfer-on-cpu", **options) as engine,
        loaded(checkpoint, host, "torch", **options) as oracle,
    ):
        assert answers(engine) == answers(oracle)


@pytest.mark.parametrize("name", BACKENDS)
def test_two_engines_of_one_process_take_turns(host, checkpoint, name):
    with loaded(checkpoint, host, f"{name}-on-cpu") as one, loaded(checkpoint, host, f"{name}-on-cpu") as two:
        together = one.submit([lorax.GenerateRequest(prompt=PROMPTS[0], max_tokens=12)])
        beside = two.submit([lorax.GenerateRequest(prompt=PROMPTS[2], max_tokens=12)])
        found = [together.wait()[0].token_ids, beside.wait()[0].token_ids]
        alone = answers(one)

    assert found == [alone[0], alone[2]]
