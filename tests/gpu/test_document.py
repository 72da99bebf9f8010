"""docs/gpu.md says of each backend what the backend itself answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine import test_graphs
from gpu import test_planted, test_planted_kernels, test_trial
from gpu.doubles.backends import BACKENDS, backends_on_cpu

from lorax_core.attention.base import AttentionBackend, AttentionSpec, CacheLayout
from lorax_core.attention.torch import TorchBackend

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/gpu.md"
COLUMNS: list[type[AttentionBackend]] = [*BACKENDS.values(), TorchBackend]
CAUSAL = AttentionSpec(4, 4, 64, causal=True)


@pytest.fixture(scope="module", autouse=True)
def _on_cpu() -> Iterator[None]:
    with backends_on_cpu():
        yield


def supports(*specs, dtypes=(torch.bfloat16, torch.float16), kv_dtype=None, page_size=None):
    def answers(backend):
        layouts = [
            backend().layout([one], dtype, kv_dtype or dtype, "cpu", page_size) for one in specs for dtype in dtypes
        ]
        said = {isinstance(layout, CacheLayout) for layout in layouts}
        assert len(said) == 1, "some of the row and not all of it"
        return said == {True}

    return answers


def of_size(*sizes):
    return supports(
        *(replace(CAUSAL, head_dim=size) for size in sizes), *(AttentionSpec(4, 4, size, False) for size in sizes)
    )


ROWS = {
    "heads of 64, 128, 256": of_size(64, 128, 256),
    "heads of 32, 80, 96 and other multiples of 8 up to 256": of_size(8, 32, 80, 96, 192, 248),
    "heads of 20, 264 and other sizes": of_size(20, 100, 264, 320),
    "bfloat16, float16": supports(CAUSAL),
    "float32": supports(CAUSAL, dtypes=(torch.float32,)),
    "grouped-query attention (GQA)": supports(replace(CAUSAL, kv_heads=2)),
    "causal window": supports(replace(CAUSAL, window=8)),
    "window on both sides, as encoders have it": supports(AttentionSpec(4, 4, 64, False, window=8)),
    "soft cap": supports(replace(CAUSAL, soft_cap=30.0)),
    'fp8 cache, `kv_dtype="fp8_e4m3"`': supports(CAUSAL, kv_dtype=torch.float8_e4m3fn),
    "pages of 16": supports(CAUSAL, page_size=16),
    "pages of 256": supports(CAUSAL, page_size=256),
    "decoding in CUDA graphs": lambda backend: backend.plan_graph is not AttentionBackend.plan_graph,
}


def table() -> dict[str, list[str]]:
    """The rows of the table of backends, by their first cell."""
    _, _, text = DOCUMENT.read_text("utf-8").partition("| | `flashinfer` |")
    lines = text.partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def test_the_table_has_each_row_that_is_asked_and_no_other():
    assert list(table()) == list(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_table_is_what_each_backend_answers(row: str):
    assert table()[row] == ["yes" if ROWS[row](backend) else "no" for backend in COLUMNS]


def test_page_sizes_are_as_stated():
    sizes = {cls.name: cls().layout([CAUSAL], torch.bfloat16, torch.bfloat16, "cpu").page_size for cls in COLUMNS}

    assert sizes == {"flashinfer": 16, "flash_attn": 256, "torch": 16}
    assert re.search(r"16 tokens, 256 for `flash_attn`", DOCUMENT.read_text("utf-8"))


def test_every_planted_mistake_is_named():
    planted = [
        test_planted.PLANS,
        test_planted.FLASH,
        test_planted_kernels.MISTAKES,
        test_graphs.MISTAKES,
        test_trial.WRONG,
    ]
    section = " ".join(DOCUMENT.read_text("utf-8").partition("## Planted mistakes")[2].split())

    assert [name for mistakes in planted for name in mistakes if name not in section] == []
