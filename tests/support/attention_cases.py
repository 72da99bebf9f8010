"""Steps of attention over pages that are strewn about, for the native backend and the torch one beside it."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from lorax_core.attention.base import AttentionSpec, CacheLayout, HostAndDevice
from lorax_core.attention.native import FEW_ROWS, NativeBackend
from lorax_core.attention.torch import TorchBackend
from lorax_core.kernels.elementwise import READABLE, Angles
from lorax_core.kernels.native.attention import PagedAttention
from lorax_core.kvcache.pool import KVPool

FP8 = torch.float8_e4m3fn
SPEC = AttentionSpec(heads=6, kv_heads=2, head_dim=64, causal=True)


@dataclass(frozen=True)
class Case:
    """A step over a cache whose pages are strewn about."""

    spec: AttentionSpec = SPEC
    sequences: tuple[tuple[int, int], ...] = ((0, 1), (15, 1), (16, 1), (300, 1), (40, 5))  # (cached, new)
    page: int = 16
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    rotary: int = 64
    seed: int = 0

    def compute(self, backend: Any, *, exact: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The step's answers, and the cache after it; in float32 throughout with `exact`."""
        generator = torch.Generator().manual_seed(self.seed)
        spec, dtype = self.spec, torch.float32 if exact else self.dtype
        kv_dtype = self.kv_dtype or dtype
        counts = [-(-(past + new) // self.page) for past, new in self.sequences]
        ids = list(range(1, sum(counts) + 1))
        random.Random(self.seed).shuffle(ids)
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for row, count in zip(table, counts, strict=True):
            row[:count] = torch.tensor([ids.pop() for _ in range(count)])
        shape = {"pages": sum(counts) + 1, "page_size": self.page, "kv_heads": spec.kv_heads, "head_dim": spec.head_dim}
        pool = KVPool(layers=2, dtype=kv_dtype, device="cpu", scales=[(1.0, 1.0), (0.5, 2.0)], **shape)
        old = torch.arange(self.page, (sum(counts) + 1) * self.page)
        tokens = sum(new for _, new in self.sequences)

        def drawn(rows: int, heads: int) -> torch.Tensor:
            return torch.randn(rows, heads, spec.head_dim, generator=generator).to(self.dtype).to(dtype)

        pool.write(1, drawn(len(old), spec.kv_heads), drawn(len(old), spec.kv_heads), old)
        q, k, v = torch.split(
            drawn(tokens, spec.heads + 2 * spec.kv_heads), [spec.heads, spec.kv_heads, spec.kv_heads], 1
        )
        turns = torch.rand(tokens, 1, self.rotary // 2, generator=generator) * 6
        angles = Angles(turns.cos().to(self.dtype).to(dtype), turns.sin().to(self.dtype).to(dtype))
        slots = [
            int(row[at // self.page]) * self.page + at % self.page
            for row, (past, new) in zip(table, self.sequences, strict=True)
            for at in range(past, past + new)
        ]
        starts = [0, *itertools.accumulate(new for _, new in self.sequences)]
        rows = SimpleNamespace(
            query_starts=int32(starts),
            kv_lengths=int32([past + new for past, new in self.sequences]),
            page_table=HostAndDevice(table, table),
            slots=torch.tensor(slots),
        )
        assert isinstance(backend.layout([spec], dtype, kv_dtype, "cpu", self.page), CacheLayout)
        backend.bind([spec], dtype, pool)
        layer = SimpleNamespace(index=1, spec=spec, elementwise=READABLE)
        answers = backend.plan(rows).forward(layer, q, k, v, angles if self.rotary else None)
        return answers, pool.data.view(torch.uint8)


def int32(values):
    tensor = torch.tensor(values, dtype=torch.int32)
    return HostAndDevice(tensor, tensor)


def drawn_cases():
    chosen = random.Random(7)
    for seed in range(80):
        dtype = chosen.choice([torch.float32, torch.bfloat16])
        dim, kv_heads, group = (
            chosen.choice([16, 48, 64, 128, 256]),
            chosen.choice([1, 2, 3]),
            chosen.choice([1, 2, 7, 9, 17]),
        )
        yield Case(
            AttentionSpec(
                kv_heads * group,
                kv_heads,
                dim,
                causal=True,
                window=chosen.choice([None, None, 1, 5, 17, 40]),
                soft_cap=chosen.choice([None, None, 2.0]),
            ),
            tuple(
                (
                    chosen.choice([0, 1, 15, 16, 17, 100, 700, 1500]),
                    chosen.choice([1, 1, 1, 2, 5, FEW_ROWS, FEW_ROWS + 1, 30]),
                )
                for _ in range(chosen.randint(1, 6))
            ),
            page=chosen.choice([1, 3, 8, 16, 32, 48]),
            dtype=dtype,
            kv_dtype=chosen.choice([None, None, FP8]),
            rotary=chosen.choice([0, dim, dim // 4 // 2 * 2]),
            seed=seed,
        )


def off(found, expected):
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def check(case: Case, backend: NativeBackend) -> None:
    """A step's answers and the cache that it leaves are those of the torch backend."""
    expected, cache = case.compute(TorchBackend())

    found, written = case.compute(backend)

    assert torch.equal(written, cache)
    if case.dtype is torch.float32:
        assert off(found, expected) < 1e-5
    else:
        exact, _ = case.compute(TorchBackend(), exact=True)
        # Both round their answers; the compiled one keeps weights in float32.
        assert off(found, exact) <= 1.5 * off(expected, exact) + 2**-9


class With(NativeBackend):
    """A native backend whose functions are those of a given library."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self._library = library

    def bind(self, specs: Any, dtype: torch.dtype, cache: KVPool) -> None:
        super().bind(specs, dtype, cache)
        self._product = PagedAttention(self._library)
