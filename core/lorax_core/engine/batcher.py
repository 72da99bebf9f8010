"""From a plan to the tensors of one forward pass.

Decides the order of rows (adapter by adapter, so that each is one product) and which rows each head reads. Knows nothing of
who is scheduled or what becomes of the answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from lorax_core.adapters.apply import AdapterRowsMaker
from lorax_core.adapters.base import Bound
from lorax_core.adapters.lora_kernels.base import LoraKernel
from lorax_core.engine.scheduler import Chunk, StepPlan
from lorax_core.errors import AdapterError
from lorax_core.kvcache.pool import KVPool
from lorax_core.modeling.batch import Batch, HeadRows, Speculator
from lorax_core.modeling.heads import Head
from lorax_core.modeling.model import Model
from lorax_core.types import Task


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch and, in its order, the chunks that its sequences are."""

    batch: Batch
    chunks: tuple[Chunk, ...]


class Batcher:
    """Makes batches for one model and its cache (None for models without)."""

    def __init__(
        self,
        model: Model,
        pool: KVPool | None,
        adapters: Mapping[str, Bound] = MappingProxyType({}),
        kernel: LoraKernel | None = None,
    ) -> None:
        self._model = model
        self._pool = pool
        self._device = model.device
        self._bound = adapters
        self._adapters = AdapterRowsMaker(kernel)

    def pack(self, plan: StepPlan) -> Packed:
        """The batch of a plan. Chunks are ordered by adapter, the base first."""
        self._adapters.start_step()
        chunks = sorted(plan.chunks, key=lambda c: c.sequence.adapter.identity if c.sequence.adapter else "")
        ids: list[int] = []
        positions: list[int] = []
        types: list[int] = []
        for chunk in chunks:
            stop = chunk.start + chunk.length
            ids += chunk.sequence.tokens(chunk.start, stop)
            positions += range(chunk.start, stop)
            given = chunk.sequence.token_types
            types += given[chunk.start : stop] if given is not None else [0] * chunk.length
        lengths = tuple(chunk.length for chunk in chunks)
        batch = Batch(
            input_ids=self._tensor(ids),
            position_ids=self._tensor(positions),
            token_type_ids=self._tensor(types),
            lengths=lengths,
            head_rows=tuple(self._head_rows(chunks)),
            adapters=self._adapters.rows(lengths, [self._adapter(chunk) for chunk in chunks]),
        )
        if self._pool is not None:
            batch.kv = self._pool
            batch.cached = tuple(chunk.start for chunk in chunks)
            batch.pages = tuple(tuple(chunk.sequence.pages) for chunk in chunks)
            batch.slots = self._tensor([slot for chunk in chunks for slot in _slots(chunk, self._pool.page_size)])
        return Packed(batch, tuple(chunks))

    def _head_rows(self, chunks: list[Chunk]) -> Iterable[HeadRows]:
        """For each head in the step, the rows that it reads."""
        chosen: dict[tuple[Task, Head | None, Speculator | None], list[tuple[int, range]]] = {}
        start = 0
        for index, chunk in enumerate(chunks):
            wanted = _wanted_rows(chunk)
            if wanted:
                shifted = range(start + wanted.start, start + wanted.stop)
                sequence = chunk.sequence
                bound = self._adapter(chunk)
                head = bound.head if bound is not None and sequence.head is not None else None
                speculator = bound.speculator if bound is not None and sequence.drafter is not None else None
                chosen.setdefault((sequence.task, head, speculator), []).append((index, shifted))
            start += chunk.length
        for (task, head, speculator), group in chosen.items():
            counts = tuple(len(rows) for _, rows in group)
            yield HeadRows(
                task=task,
                sequences=tuple(index for index, _ in group),
                counts=counts,
                rows=self._tensor([row for _, rows in group for row in rows]),
                adapters=self._adapters.rows(counts, [self._adapter(chunks[index]) for index, _ in group]),
                head=head,
                speculator=speculator,
            )

    def _adapter(self, chunk: Chunk) -> Bound | None:
        adapter = chunk.sequence.adapter
        if adapter is None:
            return None
        bound = self._bound.get(adapter.identity)
        if bound is None:  # rows without their adapter would be answered as the base's
            raise AdapterError(
                f"the adapter {adapter.identity[:12]} is not on the device any more", hint="load it again"
            )
        return bound

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _wanted_rows(chunk: Chunk) -> range:
    """Rows of the chunk, counted from its own start, that the sequence's head reads."""
    span = chunk.sequence.span
    if span is not None:
        return range(max(span.start - chunk.start, 0), min(span.stop - chunk.start, chunk.length))
    if scores_prompt(chunk):
        return range(chunk.length)
    return range(chunk.length - 1 - chunk.drafted if chunk.final else chunk.length, chunk.length)


def scores_prompt(chunk: Chunk) -> bool:
    """Whether every row of the chunk is read, because the prompt's own tokens are scored."""
    return chunk.sequence.prompt_logprobs is not None and chunk.start < len(chunk.sequence.prompt) - 1


def _slots(chunk: Chunk, page_size: int) -> Iterable[int]:
    """Where in the cache the chunk's tokens go."""
    position, stop = chunk.start, chunk.start + chunk.length
    while position < stop:
        page, offset = divmod(position, page_size)
        count = min(page_size - offset, stop - position)
        first = chunk.sequence.pages[page] * page_size + offset
        yield from range(first, first + count)
        position += count
