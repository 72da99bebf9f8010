"""A model that decodes through captured graphs and eagerly beside it, while adapters come and go.

Decides nothing that the runtime decides; it says how far apart the two are.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from captured import CapturableBackend, CapturableKernel
from gpu.doubles.tape import Tape
from rigs import PAGE, make_adapters, make_pool

from lorax_core.adapters.lora_kernels.base import LoraKernel
from lorax_core.adapters.residency.handle import AdapterHandle
from lorax_core.attention.base import AttentionBackend
from lorax_core.attention.torch import TorchBackend
from lorax_core.engine.batcher import Batcher
from lorax_core.engine.graphs import DecodeGraphs
from lorax_core.engine.sequence import Sampling
from lorax_core.engine.step_input import ChunkInput, HeadRead, SamplingRow, StepInput
from lorax_core.types import Task
from lorax_core.weights.loader import LoadedModel

ROWS = 8
COUNTS = (8, 6, 8, 3, 7, 8)
PAGES = 32


class Rig:
    """A model that decodes the same steps twice: through graphs over one cache, eagerly over its twin."""

    def __init__(
        self,
        base: LoadedModel,
        *,
        graphs: type[DecodeGraphs] = DecodeGraphs,
        backend: Callable[[], AttentionBackend] = CapturableBackend,
        kernel: Callable[[], LoraKernel | None] = CapturableKernel,
    ) -> None:
        self.base = base
        model = base.model
        self.store = make_adapters(self.base)
        self.source = random.Random(0)
        self.pool, self.twin = (make_pool(self.base, PAGES) for _ in range(2))
        self.pool.data.normal_(generator=torch.Generator().manual_seed(1))
        self.pool.data[:, :, 0] = 0
        self.twin.data.copy_(self.pool.data)
        self.backend, self.eager = backend(), TorchBackend()
        self.backend.bind(model.attention_specs, model.dtype, self.pool)
        self.eager.bind(model.attention_specs, model.dtype, self.twin)
        self.batcher = Batcher(model, PAGE, self.store.bound)
        self.tapes: list[Tape] = []
        self.graphs = graphs(model, self.backend, self.pool, kernel(), ROWS, self.tape)
        free = self.source.sample(range(1, PAGES + 1), PAGES)
        # Some lengths end a page, others begin one.
        lengths = [16, 31, 1, 47, 20, 33, 5, 40, 28, 12]
        self.sequences = {at: (length, [free.pop() for _ in range(3)]) for at, length in enumerate(lengths)}

    def tape(self) -> Tape:
        """An empty tape, kept to be asked."""
        self.tapes.append(Tape())
        return self.tapes[-1]

    def chunks(self, count: int, adapters: Sequence[AdapterHandle | None] = (None,)) -> tuple[ChunkInput, ...]:
        """A step of so many sequences, rows of one adapter side by side; each sequence is a token longer afterwards."""
        rows = []
        for number in self.source.sample(sorted(self.sequences), count):
            start, pages = self.sequences[number]
            if start >= 3 * PAGE - 1:
                start = 0
            self.sequences[number] = start + 1, pages
            token = self.source.randrange(90)
            adapter = self.source.choice(adapters)
            rows.append((adapter.identity if adapter else "", number, start, pages[: start // PAGE + 1], token))
        return tuple(
            make_chunk(number, token, start, pages, adapter or None)
            for adapter, number, start, pages, token in sorted(rows)
        )

    @torch.inference_mode()
    def step(self, count: int, adapters: Sequence[AdapterHandle | None] = (None,)) -> float:
        """How far a replayed step is from the eager one, in logits and in the cache; infinite where it is NaN."""
        chunks = self.chunks(count, adapters)
        segments = self.batcher.segments(chunks)
        found = self.graphs.run(chunks, segments, lambda ids: None)
        assert isinstance(found, torch.Tensor), found
        batch = self.batcher.pack(StepInput(chunks))
        batch.attention = self.eager.plan(batch)
        [expected] = self.base.model(batch).answers
        cache = float((self.pool.data[:, :, 1:] - self.twin.data[:, :, 1:]).abs().max())
        self.twin.data.copy_(self.pool.data)  # so that steps are judged one by one
        error = max(float((found - expected).abs().max() / expected.abs().max()), cache)
        return error if error == error else float("inf")


def make_chunk(
    number: int, token: int, start: int, pages: list[int], adapter: str | None = None, **changes: object
) -> ChunkInput:
    """One decoding row."""
    fields: dict[str, object] = {
        "sequence": number + 1,
        "start": start,
        "tokens": array("q", [token]),
        "reads": (HeadRead(Task.GENERATE, range(1)),),
        "pages": array("i", pages),
        "adapter": adapter,
        "sampled": (SamplingRow(Sampling(), start + 1),),
        "restarted": False,
    }
    return ChunkInput(**{**fields, **changes})


def drive(rig: Rig, lora: Sequence[Path]) -> float:
    """Steps between which adapters come, go and take each other's place; the largest error."""
    handles = {}
    worst = 0.0
    for at, count in enumerate(COUNTS):
        if at in (1, 2, 4):
            handles[at] = rig.store.load(f"adapter-{at}", lora[len(handles)])
        if at == 3:
            rig.store.unload("adapter-1")
            del handles[1]
            handles[3] = rig.store.load("adapter-1", lora[2])
        worst = max(worst, rig.step(count, (None, *handles.values())))
    return worst
