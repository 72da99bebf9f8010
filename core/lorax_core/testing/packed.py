"""Passes over packed batches, as the engine makes them but with every choice in the open.

Decides nothing by itself: which tokens of which texts run together, on which pages, under which adapters is the caller's
choice. Knows nothing of schedules, requests or threads.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorax_core.adapters.apply import AdapterRowsMaker
from lorax_core.adapters.base import Bound
from lorax_core.adapters.lora_kernels.select import AutoKernel
from lorax_core.attention.base import AttentionBackend
from lorax_core.kvcache.allocator import SCRATCH_PAGE
from lorax_core.kvcache.pool import KVPool
from lorax_core.modeling.batch import Batch, HeadRows
from lorax_core.modeling.model import Model
from lorax_core.settings import Settings
from lorax_core.testing.texts import Text
from lorax_core.types import Task

POISON = 1000.0
"""What memory of the cache holds that nobody wrote: finite, as all memory of the engine is, and far off if it is read."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens `start` to `stop` of a text, those before being in the cache on its `pages` already."""

    text: Text
    start: int
    stop: int
    pages: tuple[int, ...] = ()
    adapter: Bound | None = None


@dataclass(slots=True)
class Rows:
    """What one pass gave one piece: hidden rows, and what each head made of those of them that it reads."""

    hidden: Tensor  # [tokens of the piece, hidden]
    parts: dict[Task, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Answer:
    """What a whole text got: hidden rows, and of each head its joined parts and the finished answer (logits to generate)."""

    hidden: Tensor  # [tokens, hidden]
    parts: dict[Task, Tensor]
    answers: dict[Task, Tensor]


class Bench:
    """One model on one attention backend, with a cache whose unwritten memory is poison."""

    def __init__(self, model: Model, backend: AttentionBackend, page_size: int, texts: Sequence[Text]) -> None:
        self.model = model
        self.page_size = page_size
        self._backend = backend
        self._rows = AdapterRowsMaker(AutoKernel(model.dtype, model.device, Settings.from_env()))
        self._pool: KVPool | None = None
        if model.needs_kv_cache:
            spec = model.attention_specs[0]
            pages = 2 + 2 * sum(self._pages_for(text) for text in texts)
            self._pool = KVPool(
                layers=len(model.attention_layers),
                pages=pages,
                page_size=page_size,
                kv_heads=spec.kv_heads,
                head_dim=spec.head_dim,
                dtype=model.dtype,
                device=model.device,
            )
            self._pool.data.fill_(POISON)

    def whole(self, texts: Sequence[Text], adapters: Sequence[Bound | None] | None = None) -> list[Answer]:
        """Each text in one piece, all in one batch."""
        return self.stepwise(texts, [[len(text)] for text in texts], adapters)

    def stepwise(
        self,
        texts: Sequence[Text],
        cuts: Sequence[Sequence[int]],
        adapters: Sequence[Bound | None] | None = None,
        *,
        shuffle: int | None = None,
    ) -> list[Answer]:
        """Each text in pieces that end at its `cuts`, the n-th pieces of all texts in one batch.

        `shuffle` seeds an order of pages in which texts are torn apart; without it they lie end to end.
        """
        pages = self.give_pages(texts, shuffle)
        adapters = adapters or [None] * len(texts)
        rows: list[list[Rows]] = [[] for _ in texts]
        for step in range(max(len(cut) for cut in cuts)):
            running = [at for at, cut in enumerate(cuts) if step < len(cut)]
            pieces = [
                Piece(texts[at], cuts[at][step - 1] if step else 0, cuts[at][step], pages[at], adapters[at])
                for at in running
            ]
            for at, given in zip(running, self.run(self.batch(pieces), pieces), strict=True):
                rows[at].append(given)
        return [self._join(text, given) for text, given in zip(texts, rows, strict=True)]

    def give_pages(self, texts: Sequence[Text], shuffle: int | None = None) -> list[tuple[int, ...]]:
        """Pages for whole texts, from page 1 up or in a shuffled order of all pages."""
        if self._pool is None:
            return [() for _ in texts]
        order = list(range(1, self._pool.pages))
        if shuffle is not None:
            random.Random(shuffle).shuffle(order)
        free = iter(order)
        return [tuple(next(free) for _ in range(self._pages_for(text))) for text in texts]

    def batch(self, pieces: Sequence[Piece]) -> Batch:
        """The batch of some pieces, in their order."""
        lengths = tuple(piece.stop - piece.start for piece in pieces)
        batch = Batch(
            input_ids=self._tensor([token for p in pieces for token in p.text.ids[p.start : p.stop]]),
            position_ids=self._tensor([at for p in pieces for at in range(p.start, p.stop)]),
            token_type_ids=self._tensor([kind for p in pieces for kind in p.text.types[p.start : p.stop]]),
            lengths=lengths,
            head_rows=self._head_rows(pieces, lengths),
            attention=self._backend,
            adapters=self._rows.rows(lengths, [piece.adapter for piece in pieces]),
        )
        if self._pool is not None:
            batch.kv = self._pool
            batch.cached = tuple(piece.start for piece in pieces)
            batch.pages = tuple(self._held(piece) for piece in pieces)
            batch.slots = self._tensor([self._slot(p, at) for p in pieces for at in range(p.start, p.stop)])
        return batch

    def run(self, batch: Batch, pieces: Sequence[Piece]) -> list[Rows]:
        """One forward pass; what it gave each piece, in float32 on the CPU."""
        self._plan(batch)
        hidden, *answers = self.model(batch).answers
        given = [Rows(rows.float().cpu()) for rows in torch.split(hidden, list(batch.lengths))]
        for group, answer in zip(batch.head_rows[1:], answers, strict=True):
            assert group.task is not None
            pooled = self.model.head(group.task).pooled
            split = torch.split(answer, [1] * len(group.counts) if pooled else list(group.counts))
            for at, part in zip(group.sequences, split, strict=True):
                given[at].parts[group.task] = part[0] if pooled else part
        return given

    @torch.inference_mode()
    def _plan(self, batch: Batch) -> None:
        self._backend.plan(batch, self.model.attention_specs)

    def _head_rows(self, pieces: Sequence[Piece], lengths: tuple[int, ...]) -> tuple[HeadRows, ...]:
        """All rows as they are, then for each head those that it reads."""
        every = [range(piece.start, piece.stop) for piece in pieces]
        groups = [self._group(None, pieces, lengths, every)]
        groups += [
            self._group(task, pieces, lengths, [self.span(task, piece.text) for piece in pieces])
            for task in self.model.tasks
        ]
        return tuple(group for group in groups if group.task is None or group.counts)

    def _group(
        self, task: Task | None, pieces: Sequence[Piece], lengths: tuple[int, ...], spans: Sequence[range]
    ) -> HeadRows:
        sequences, counts, rows, first = [], [], [], 0
        for at, (piece, length, span) in enumerate(zip(pieces, lengths, spans, strict=True)):
            wanted = range(max(span.start, piece.start), min(span.stop, piece.stop))
            if wanted:
                sequences.append(at)
                counts.append(len(wanted))
                rows += [first + position - piece.start for position in wanted]
            first += length
        adapters = self._rows.rows(counts, [pieces[at].adapter for at in sequences])
        return HeadRows(task, tuple(sequences), tuple(counts), self._tensor(rows), adapters)

    def span(self, task: Task, text: Text) -> range:
        """The tokens of a text that a head reads; to generate, all of them."""
        return range(len(text)) if task is Task.GENERATE else self.model.head(task).span(text.ids, 0)

    @torch.inference_mode()
    def _join(self, text: Text, given: Sequence[Rows]) -> Answer:
        """A text's pieces put together, as the engine does."""
        parts: dict[Task, Tensor] = {}
        answers: dict[Task, Tensor] = {}
        for task in self.model.tasks:
            head, found = self.model.head(task), [rows.parts[task] for rows in given if task in rows.parts]
            joined = torch.stack(found).sum(0) if head.pooled else torch.cat(found)
            finished = joined if task is Task.GENERATE else head.finish([joined], [len(self.span(task, text))])[0]
            parts[task], answers[task] = joined.float().cpu(), finished.float().cpu()
        return Answer(torch.cat([rows.hidden for rows in given]), parts, answers)

    def _pages_for(self, tokens: Text | int) -> int:
        return -(-(tokens if isinstance(tokens, int) else len(tokens)) // self.page_size)

    def _held(self, piece: Piece) -> tuple[int, ...]:
        """The pages of a piece. As in the engine, those that lie wholly behind every window have been given back."""
        window = self.model.widest_window
        behind = 0 if window is None else max(piece.start + 1 - window, 0) // self.page_size
        return (SCRATCH_PAGE,) * behind + piece.pages[behind : self._pages_for(piece.stop)]

    def _slot(self, piece: Piece, at: int) -> int:
        return piece.pages[at // self.page_size] * self.page_size + at % self.page_size

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.model.device)
