"""Who runs next.

Decides which tokens of which sequences make up a step, within a budget of tokens, rows and pages. Pure planning, without
tensors. Sequences that decode come first, one token each, so a long prompt never stalls running answers; prompts share what
is left in order of arrival, in chunks. When pages run out the youngest sequence gives its pages back and is computed again
later, so the oldest always ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from lorax_core.engine.sequence import Sequence
from lorax_core.kvcache.allocator import PageAllocator


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `start + length` of a sequence, to be computed now."""

    sequence: Sequence
    start: int
    length: int

    @property
    def final(self) -> bool:
        """Whether this chunk ends with the newest token, so that the sequence gets its answer."""
        return self.start + self.length == len(self.sequence)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The chunks of one step. Empty when nothing can run."""

    chunks: tuple[Chunk, ...]

    @property
    def tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


class Scheduler:
    """Plans steps over all living sequences.

    With an `allocator`, sequences hold pages and may be computed in chunks. Without one (bidirectional models) a text runs
    whole; one that is longer than `max_tokens` runs alone.
    """

    def __init__(self, *, max_tokens: int, max_rows: int, allocator: PageAllocator | None = None) -> None:
        if max_tokens < 1 or max_rows < 1:
            raise ValueError(f"a step needs room for a token and a row, not {max_tokens} and {max_rows}")
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.allocator = allocator
        self._running: dict[int, Sequence] = {}  # by arrival, in that order
        self._waiting: deque[Sequence] = deque()
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._running.values()
        yield from self._waiting

    def add(self, sequence: Sequence) -> None:
        """A new sequence joins the end of the queue."""
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence leaves, finished or cancelled; its pages are free before the next plan."""
        self._release(sequence)
        if self._running.pop(sequence.arrival, None) is None and sequence in self._waiting:
            self._waiting.remove(sequence)

    def plan(self) -> StepPlan:
        """The next step. Pages that its tokens need are allocated already."""
        chunks: dict[int, Chunk] = {}
        budget = self.max_tokens
        decoding = [sequence for sequence in self._running.values() if sequence.remaining == 1]
        prompts = [sequence for sequence in self._running.values() if sequence.remaining > 1]
        for sequence in (*decoding, *prompts):
            if len(chunks) == self.max_rows or budget == 0:
                break
            if sequence.arrival not in self._running:  # it gave its pages to an older one
                continue
            length = min(sequence.remaining, budget)
            freed = self._reserve(sequence, length, chunks)
            if freed is not None:
                budget += freed
                chunks[sequence.arrival] = Chunk(sequence, sequence.computed, length)
                budget -= length
        self._admit(chunks, budget)
        return StepPlan(tuple(chunks[arrival] for arrival in sorted(chunks)))

    def advance(self, plan: StepPlan) -> None:
        """The step was computed: its tokens count as such."""
        for chunk in plan.chunks:
            chunk.sequence.computed = chunk.start + chunk.length

    def check(self) -> None:
        """Prove the invariants between sequences and pages; AssertionError otherwise."""
        arrivals = list(self._running)
        assert arrivals == sorted(set(arrivals)), "running sequences are out of order"
        assert all(sequence.computed == 0 and not sequence.pages for sequence in self._waiting), (
            "a waiting one holds pages"
        )
        if self.allocator is not None:
            for sequence in self._running.values():
                held = len(sequence.pages) * self.allocator.page_size
                assert sequence.computed <= held, "more tokens computed than pages hold"
            self.allocator.check(sequence.pages for sequence in self._running.values())

    def _admit(self, chunks: dict[int, Chunk], budget: int) -> None:
        """Waiting sequences in order of arrival, until one does not fit."""
        while self._waiting and budget > 0 and len(chunks) < self.max_rows and len(self._running) < self.max_rows:
            sequence = self._waiting[0]
            length = sequence.remaining
            if self.allocator is None:
                if length > budget and chunks:
                    return
            else:
                length = min(length, budget)
                if not self._grow(sequence, length):
                    return
            self._run(self._waiting.popleft())
            chunks[sequence.arrival] = Chunk(sequence, sequence.computed, length)
            budget -= length

    def _run(self, sequence: Sequence) -> None:
        youngest = next(reversed(self._running), 0)
        self._running[sequence.arrival] = sequence
        if sequence.arrival < youngest:  # it gave its pages back before, and is older than one that runs
            self._running = dict(sorted(self._running.items()))

    def _reserve(self, sequence: Sequence, length: int, chunks: dict[int, Chunk]) -> int | None:
        """Pages for `length` more tokens, taken from the youngest if need be.

        Gives the tokens of chunks that were planned and had to give way, or None when `sequence` itself had to.
        """
        freed = 0
        while not self._grow(sequence, length):
            victim = self._running[next(reversed(self._running))]
            planned = chunks.pop(victim.arrival, None)
            freed += planned.length if planned is not None else 0
            self._preempt(victim)
            if victim is sequence:
                return None
        return freed

    def _grow(self, sequence: Sequence, length: int) -> bool:
        if self.allocator is None:
            return True
        needed = self.allocator.pages_for(sequence.computed + length) - len(sequence.pages)
        pages = self.allocator.allocate(max(needed, 0))
        if pages is None:
            return False
        sequence.pages += pages
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.computed = 0
        sequence.part = None
        del self._running[sequence.arrival]
        self._waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        if self.allocator is not None and sequence.pages:
            self.allocator.release(sequence.pages)
        sequence.pages = []
