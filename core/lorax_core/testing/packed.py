"""Passes over packed batches, made as the engine makes them but with every choice in the open.

Decides nothing by itself: which tokens of which inputs run together, on which pages, under which adapters is the caller's
choice. Knows nothing of schedules, requests or threads.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorax_core.adapters.base import Bound
from lorax_core.adapters.lora_kernels.select import AutoKernel
from lorax_core.attention.base import AttentionBackend, CacheLayout
from lorax_core.engine.batcher import Batcher
from lorax_core.engine.step_input import ChunkInput, HeadRead, StepInput
from lorax_core.kvcache.allocator import SCRATCH_PAGE
from lorax_core.kvcache.pool import KVPool
from lorax_core.modeling.batch import Batch
from lorax_core.modeling.model import Model
from lorax_core.settings import Settings
from lorax_core.testing.inputs import Input
from lorax_core.types import Task

POISON = 1000.0
"""What cache memory holds before it is written: finite, as all memory of the engine is, but so large that reading it shows."""


@dataclass(frozen=True, slots=True)
class Share:
    """Tokens `start` to `stop` of an input; those before are in the cache on its `pages` already."""

    input: Input
    start: int
    stop: int
    pages: tuple[int, ...] = ()
    adapter: Bound | None = None


@dataclass(slots=True)
class Rows:
    """What one pass gave one share: hidden rows, and what each head made of those of them that it reads."""

    hidden: Tensor  # [tokens of the share, hidden]
    parts: dict[Task, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class PackedAnswer:
    """What a whole input got: hidden rows, and of each head its joined parts and the finished answer (logits to generate)."""

    hidden: Tensor  # [tokens, hidden]
    parts: dict[Task, Tensor]
    answers: dict[Task, Tensor]


class Bench:
    """One model on one attention backend, with a cache whose unwritten memory is poison."""

    def __init__(self, model: Model, backend: AttentionBackend, layout: CacheLayout, inputs: Sequence[Input]) -> None:
        self.model = model
        self.page_size = layout.page_size
        self._backend = backend
        self._pool: KVPool | None = None
        if model.needs_kv_cache:
            spec = model.attention_specs[0]
            # Twice what the inputs need, so that shuffled pages leave unwritten ones between; scratch is one more.
            pages = 2 + 2 * sum(self._pages_for(tokens) for tokens in inputs)
            self._pool = KVPool(
                layers=len(model.attention_layers),
                pages=pages,
                page_size=layout.page_size,
                kv_heads=spec.kv_heads,
                head_dim=spec.head_dim,
                dtype=layout.dtype,
                device=model.device,
            )
            self._pool.data.fill_(POISON)
        self._adapters: dict[str, Bound] = {}
        kernel = AutoKernel(model.dtype, model.device, Settings.from_env())
        self._batcher = Batcher(model, layout.page_size if self._pool is not None else None, self._adapters, kernel)
        backend.bind(model.attention_specs, model.dtype, self._pool)

    def whole(self, inputs: Sequence[Input], adapters: Sequence[Bound | None] | None = None) -> list[PackedAnswer]:
        """Each input in one share, all in one batch."""
        return self.stepwise(inputs, [[len(tokens)] for tokens in inputs], adapters)

    def stepwise(
        self,
        inputs: Sequence[Input],
        cuts: Sequence[Sequence[int]],
        adapters: Sequence[Bound | None] | None = None,
        *,
        shuffle: int | None = None,
    ) -> list[PackedAnswer]:
        """Each input in shares that end at its `cuts`, the n-th shares of all inputs in one batch.

        `shuffle` seeds a random order of pages, which separates the pages of an input; without it they lie end to end.
        """
        pages = self.give_pages(inputs, shuffle)
        adapters = adapters or [None] * len(inputs)
        rows: list[list[Rows]] = [[] for _ in inputs]
        for step in range(max(len(cut) for cut in cuts)):
            running = [at for at, cut in enumerate(cuts) if step < len(cut)]
            shares = [
                Share(inputs[at], cuts[at][step - 1] if step else 0, cuts[at][step], pages[at], adapters[at])
                for at in running
            ]
            for at, given in zip(running, self.run(self.batch(shares)), strict=True):
                rows[at].append(given)
        return [self._join(tokens, given) for tokens, given in zip(inputs, rows, strict=True)]

    def give_pages(self, inputs: Sequence[Input], shuffle: int | None = None) -> list[tuple[int, ...]]:
        """Pages for whole inputs, from page 1 up or in a shuffled order of all pages."""
        if self._pool is None:
            return [() for _ in inputs]
        # Page 0 is the scratch page, which padding writes to.
        order = list(range(1, self._pool.pages))
        if shuffle is not None:
            random.Random(shuffle).shuffle(order)
        free = iter(order)
        return [tuple(next(free) for _ in range(self._pages_for(tokens))) for tokens in inputs]

    def batch(self, shares: Sequence[Share]) -> Batch:
        """The batch of some shares, in their order; valid until the next one is made."""
        # The batcher looks adapters up by key, as it does in the engine; here the keys are made for one batch.
        self._adapters.clear()
        self._adapters.update({_identity(one.adapter): one.adapter for one in shares if one.adapter is not None})
        chunks = tuple(self._chunk(at, share) for at, share in enumerate(shares))
        return self._batcher.pack(StepInput(chunks))

    def run(self, batch: Batch) -> list[Rows]:
        """One forward pass; what it gave each share, in float32 on the CPU."""
        self._plan(batch)
        # `_chunk` asks for all hidden rows first, so they are the first answer.
        hidden, *answers = self.model(batch).answers
        # hidden is [tokens of all shares, hidden], one share after the other
        given = [Rows(rows.float().cpu()) for rows in torch.split(hidden, list(batch.lengths))]
        for group, answer in zip(batch.head_rows[1:], answers, strict=True):
            assert group.task is not None
            pooled = self.model.head(group.task).pooled
            # A pooling head gives one row for each share, others one for each row that they read.
            split = torch.split(answer, [1] * len(group.counts) if pooled else list(group.counts))
            for at, part in zip(group.sequences, split, strict=True):
                given[at].parts[group.task] = part[0] if pooled else part
        return given

    @torch.inference_mode()
    def _plan(self, batch: Batch) -> None:
        batch.attention = self._backend.plan(batch)

    def _chunk(self, at: int, share: Share) -> ChunkInput:
        """All rows as they are, then for each head those that it reads."""
        reads = [HeadRead(None, range(share.stop - share.start))]
        for task in self.model.tasks:
            span = self.span(task, share.input)
            first, last = max(span.start, share.start), min(span.stop, share.stop)
            reads.append(HeadRead(task, range(first - share.start, max(first, last) - share.start)))
        return ChunkInput(
            sequence=at,
            start=share.start,
            tokens=array("q", share.input.ids[share.start : share.stop]),
            reads=tuple(reads),
            pages=array("i", self._held(share)),
            token_types=array("q", share.input.types[share.start : share.stop]),
            adapter=_identity(share.adapter) if share.adapter is not None else None,
        )

    def span(self, task: Task, tokens: Input) -> range:
        """The tokens of an input that a head reads; to generate, all of them."""
        return range(len(tokens)) if task is Task.GENERATE else self.model.head(task).span(tokens.ids, 0)

    @torch.inference_mode()
    def _join(self, tokens: Input, given: Sequence[Rows]) -> PackedAnswer:
        """An input's shares put together, as the engine does."""
        parts: dict[Task, Tensor] = {}
        answers: dict[Task, Tensor] = {}
        for task in self.model.tasks:
            head, found = self.model.head(task), [rows.parts[task] for rows in given if task in rows.parts]
            # Parts of a pooled head are sums over rows, so that a prompt in chunks can be added up.
            joined = torch.stack(found).sum(0) if head.pooled else torch.cat(found)
            finished = joined if task is Task.GENERATE else head.finish([joined], [len(self.span(task, tokens))])[0]
            parts[task], answers[task] = joined.float().cpu(), finished.float().cpu()
        return PackedAnswer(torch.cat([rows.hidden for rows in given]), parts, answers)

    def _pages_for(self, tokens: Input | int) -> int:
        return -(-(tokens if isinstance(tokens, int) else len(tokens)) // self.page_size)

    def _held(self, share: Share) -> tuple[int, ...]:
        """The pages of a share. As in the engine, those that lie wholly behind every window have been given back."""
        window = self.model.widest_window
        behind = 0 if window is None else max(share.start + 1 - window, 0) // self.page_size
        return (SCRATCH_PAGE,) * behind + share.pages[behind : self._pages_for(share.stop)]


def _identity(adapter: Bound) -> str:
    """A key for a bound adapter, which does not know its own."""
    return f"bound-{id(adapter)}"
