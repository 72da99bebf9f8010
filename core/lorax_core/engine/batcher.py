"""From a step's plain data to the tensors of one forward pass.

Decides how chunks are packed and which rows each head reads. Its buffers of page tables and lengths are kept from step to
step, so a `Batch` is valid until the next one is packed. Knows nothing of who is scheduled or what becomes of the answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorax_core.adapters.apply import AdapterRowsMaker
from lorax_core.adapters.base import Bound
from lorax_core.adapters.lora_kernels.base import LoraKernel, Segment
from lorax_core.attention.base import HostAndDevice
from lorax_core.engine.step_input import ChunkInput, HeadRead, StepInput
from lorax_core.errors import AdapterError
from lorax_core.modeling.batch import Batch, HeadRows
from lorax_core.modeling.model import Model

Int64s = NDArray[np.int64]


class Batcher:
    """Makes batches for one model, and for its cache of pages of `page_size` tokens (None for models without).

    `adapters` are those on the device, by identity; `kernel` computes their low-rank products (torch's when None).
    """

    def __init__(
        self, model: Model, page_size: int | None, adapters: Mapping[str, Bound], kernel: LoraKernel | None = None
    ) -> None:
        self._device = model.device
        self._page_size = page_size
        self._adapters = adapters
        self._rows = AdapterRowsMaker(kernel)
        self._starts = _Buffer(self._device)
        self._lengths = _Buffer(self._device)
        self._pages = _PageTable(self._device)

    def pack(self, step: StepInput) -> Batch:
        """The batch of a step: its chunks end to end, in their order. Raises AdapterError for an adapter that is not bound."""
        self._rows.start_step()
        chunks = step.chunks
        bound = [self._bound(chunk.adapter) for chunk in chunks]
        lengths = [len(chunk.tokens) for chunk in chunks]
        positions = _joined([np.arange(chunk.start, chunk.start + len(chunk.tokens)) for chunk in chunks])
        batch = Batch(
            input_ids=self._tensor(_joined([np.frombuffer(chunk.tokens, np.int64) for chunk in chunks])),
            position_ids=self._tensor(positions),
            token_type_ids=self._tensor(_joined([_types(chunk) for chunk in chunks])),
            query_starts=self._starts.fill([0, *accumulate(lengths)]),
            kv_lengths=self._lengths.fill([chunk.start + len(chunk.tokens) for chunk in chunks]),
            head_rows=tuple(self._head_rows(chunks, bound)),
            adapters=self._rows.rows(lengths, bound),
        )
        if self._page_size is not None:
            batch.page_table = self._pages.fill([np.frombuffer(chunk.pages, np.int32) for chunk in chunks])
            batch.slots = self._tensor(_slots(batch.page_table.host.numpy(), lengths, positions, self._page_size))
        return batch

    def segments(self, chunks: Sequence[ChunkInput]) -> list[Segment] | None:
        """The rows of chunks of one token each as segments, for a step that needs no batch.

        None where an adapter does more than low-rank updates. Raises AdapterError for an adapter that is not bound.
        """
        return self._rows.segments([1] * len(chunks), [self._bound(chunk.adapter) for chunk in chunks])

    def skip(self) -> None:
        """A step was computed without a batch: what the one before was made of is dropped, adapters above all."""
        self._rows.start_step()

    def _bound(self, identity: str | None) -> Bound | None:
        found = self._adapters.get(identity) if identity is not None else None
        if found is None and identity is not None:  # its rows must never be computed as the base's
            raise AdapterError(
                f"adapter {identity[:12]}… is not bound to the model any more", hint="load the adapter again"
            )
        return found

    def _head_rows(self, chunks: Sequence[ChunkInput], bound: Sequence[Bound | None]) -> Iterable[HeadRows]:
        """For each head in the step, the rows that it reads."""
        groups: dict[tuple[object, ...], list[tuple[int, HeadRead, int]]] = {}
        start = 0
        for index, chunk in enumerate(chunks):
            for read in chunk.reads:
                whose = chunk.adapter if read.own_head or read.speculates else None
                key = (read.task, read.own_head, read.speculates, whose)
                if read.rows:
                    groups.setdefault(key, []).append((index, read, start))
            start += len(chunk.tokens)
        for group in groups.values():
            first, read, _ = group[0]
            counts = tuple(len(one.rows) for _, one, _ in group)
            rows = _joined([np.arange(start + one.rows.start, start + one.rows.stop) for _, one, start in group])
            adapter, adapters = bound[first], [bound[index] for index, _, _ in group]
            yield HeadRows(
                task=read.task,
                sequences=tuple(index for index, _, _ in group),
                counts=counts,
                rows=self._tensor(rows),
                adapters=self._rows.rows(counts, adapters),
                head=adapter.head if adapter is not None and read.own_head else None,
                speculator=adapter.speculator if adapter is not None and read.speculates else None,
                pooled_adapters=partial(self._rows.rows, (1,) * len(group), adapters),
            )

    def _tensor(self, values: Int64s) -> Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


class _Buffer:
    """A row of int32 numbers in host memory and on the device, made again only when it must grow."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = _host_tensor(64)

    def fill(self, values: Sequence[int]) -> HostAndDevice:
        if len(values) > len(self._host):
            self._host = _host_tensor(2 * len(values))
        # On a CPU `.to` returns this buffer itself: a batch is valid until the next one is packed.
        host = self._host[: len(values)]
        host.numpy()[:] = values
        return HostAndDevice(host, host.to(self._device, non_blocking=True))


class _PageTable:
    """The page tables of a step, a row a sequence. Rows are overwritten in place; behind a sequence's pages stands page 0."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = _host_tensor(64, 64)
        self._filled: list[int] = [0] * 64  # how many numbers of each row are not 0

    def fill(self, rows: Sequence[NDArray[np.int32]]) -> HostAndDevice:
        most = max(map(len, rows))
        height, width = self._host.shape
        # Doubled, so that growing sequences do not take new memory at every page.
        if len(rows) > height or most > width:
            height, width = max(height, 2 * len(rows)), max(width, 2 * most)
            self._host, self._filled = _host_tensor(height, width), [0] * height
        table = self._host.numpy()
        for at, pages in enumerate(rows):
            table[at, : len(pages)] = pages
            table[at, len(pages) : self._filled[at]] = 0
            self._filled[at] = len(pages)
        host = self._host[: len(rows), :most]
        return HostAndDevice(host, host.to(self._device, non_blocking=True))


def _host_tensor(*shape: int) -> Tensor:
    # Not pinned: of pageable memory the driver takes a copy before the call returns, so the next step may overwrite it.
    return torch.zeros(shape, dtype=torch.int32)


def _joined(runs: Sequence[Int64s]) -> Int64s:
    return np.concatenate(runs) if runs else np.zeros(0, np.int64)


def _types(chunk: ChunkInput) -> Int64s:
    types = chunk.token_types
    return np.zeros(len(chunk.tokens), np.int64) if types is None else np.frombuffer(types, np.int64)


def _slots(table: NDArray[np.int32], lengths: Sequence[int], positions: Int64s, page_size: int) -> Int64s:
    """Where in the cache each token goes: `[tokens]`."""
    sequences = np.arange(len(lengths))
    if len(positions) != len(lengths):  # not a row a sequence, as in decoding
        sequences = np.repeat(sequences, lengths)
    pages = positions // page_size
    return table[sequences, pages].astype(np.int64) * page_size + (positions - pages * page_size)
