"""Who runs next.

Decides which tokens of which sequences make up a step, within a budget of tokens, rows and pages. Pure planning, without
tensors.

- Sequences that decode come first, a token each, so a long prompt never stalls running answers; prompts share what is left,
  by rank (turn, moved by priority), in chunks.
- A sequence whose adapter is not on the device waits for it, and lets others pass whose adapters are.
- A sequence begins with the pages that the cache already has for its tokens.
- When pages run out, the last by rank gives its own back and is computed again later, so the first always ends.
- Pages that no layer can see any more (past the widest sliding window) are given back.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lorax_core.engine.queue import WaitingQueue
from lorax_core.engine.sequence import Sequence
from lorax_core.kvcache.allocator import SCRATCH_PAGE, PageAllocator

if TYPE_CHECKING:
    from lorax_core.adapters.residency.handle import AdapterHandle


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `start + length` of a sequence, to be computed now; the last `drafted` of them are guesses."""

    sequence: Sequence
    start: int
    length: int
    drafted: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def final(self) -> bool:
        """Whether this chunk reaches the newest token, so that the sequence gets its answer."""
        return self.stop - self.drafted == len(self.sequence)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The chunks of one step, by rank.

    Before anything is computed `clears` are pages to be zeroed, which somebody gave back in the middle of something, and then
    `copies` are pages `(from, to)` to be copied.
    """

    chunks: tuple[Chunk, ...]
    copies: tuple[tuple[int, int], ...] = ()
    clears: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


class AdapterGate(Protocol):
    """Who says which adapters are on the device. A sequence holds its adapter there from its admission until it leaves."""

    def start_plan(self) -> None:
        """A plan begins; adapters are asked for in the order of the queue."""

    def acquire(self, adapter: AdapterHandle) -> bool:
        """Hold an adapter; False while it is not there, and then it is on its way."""

    def share(self, adapter: AdapterHandle) -> None:
        """Hold an adapter once more, beside a sequence that holds it."""

    def release(self, adapter: AdapterHandle) -> None:
        """Hold it once less."""


@dataclass(slots=True)
class _Draft:
    """A plan being made."""

    budget: int
    rows: int
    chunks: dict[Sequence, Chunk]
    copies: list[tuple[int, int]]
    clears: list[int]

    def add(self, chunk: Chunk) -> None:
        self.chunks[chunk.sequence] = chunk
        self.budget -= chunk.length
        self.rows -= 1

    def drop(self, sequence: Sequence) -> None:
        chunk = self.chunks.pop(sequence, None)
        if chunk is not None:
            self.budget += chunk.length
            self.rows += 1

    def clear(self, pages: list[int]) -> None:
        # A page that another one is about to copy stays as it is until then; who writes to it next overwrites it.
        self.copies = [(old, new) for old, new in self.copies if new not in pages]
        kept = {old for old, _ in self.copies}
        self.clears += [page for page in pages if page not in kept]

    @property
    def full(self) -> bool:
        return self.budget < 1 or self.rows < 1


class Scheduler:
    """Plans steps over all living sequences.

    With an `allocator`, sequences hold pages and may be computed in chunks. Without one (bidirectional models) a text runs
    whole; one that is longer than `max_tokens` runs alone. `window` is the widest sliding window of the model in tokens,
    None when a layer sees everything. `scored_tokens` bounds chunks whose every row is scored, for a row of scores is as
    wide as the vocabulary. Without a `gate` every adapter is taken to be on the device.
    """

    def __init__(
        self,
        *,
        max_tokens: int,
        max_rows: int,
        allocator: PageAllocator | None = None,
        window: int | None = None,
        scored_tokens: int = 256,
        gate: AdapterGate | None = None,
    ) -> None:
        if max_tokens < 1 or max_rows < 1:
            raise ValueError(f"a step needs room for a token and a row, not {max_tokens} and {max_rows}")
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.allocator = allocator
        self.window = window
        self.scored_tokens = scored_tokens
        self.gate = gate
        self.blocked = False  # whether the last plan left out a sequence for want of its adapter
        self._running: list[Sequence] = []  # by rank
        self._queue = WaitingQueue()

    def __len__(self) -> int:
        return len(self._running) + len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._running
        yield from self._queue

    @property
    def waiting(self) -> int:
        """Sequences that have not begun, or gave their pages back."""
        return len(self._queue)

    def add(self, sequence: Sequence) -> None:
        """A new sequence joins the queue."""
        self._queue.join(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence leaves, finished or cancelled; its pages are free before the next plan. Marks it finished."""
        if sequence.finished:
            return
        sequence.finished = True
        running = sequence in self._running
        if running:
            self._stop(sequence)
        if sequence.arrival:  # a fork that has not joined yet is not counted
            self._queue.depart(sequence, waiting=not running)
        self._release(sequence)

    def plan(self) -> StepPlan:
        """The next step. Pages that its tokens need are allocated already."""
        draft = _Draft(self.max_tokens, self.max_rows, {}, [], [])
        decoding = [sequence for sequence in self._running if sequence.remaining == 1]
        prompts = [sequence for sequence in self._running if sequence.remaining > 1]
        for sequence in (*decoding, *prompts):
            if draft.full:
                break
            if sequence.pages or self.allocator is None:  # it has not just given them to one before it
                self._continue(sequence, draft)
        self._admit_all(draft)
        chunks = sorted(draft.chunks.values(), key=lambda chunk: chunk.sequence.rank)
        return StepPlan(tuple(chunks), tuple(draft.copies), tuple(draft.clears))

    def advance(self, chunk: Chunk, accepted: int = 0) -> None:
        """A chunk was computed, and `accepted` of its guesses were right: those tokens count as computed.

        Full pages become known to others, rejected guesses give their pages back, and so do tokens behind the window.
        """
        sequence = chunk.sequence
        sequence.computed = chunk.stop - chunk.drafted + accepted
        sequence.draft = []
        if self.allocator is None:
            return
        size = self.allocator.page_size
        needed = self.allocator.pages_for(sequence.computed)
        if len(sequence.pages) > needed:
            self.allocator.release(sequence.pages[needed:])
            del sequence.pages[needed:]
        full = min(sequence.computed, len(sequence)) // size
        first = chunk.start // size
        keys = sequence.keys(full, size)
        for page, key in zip(sequence.pages[first:full], keys[first:full], strict=True):
            if page != SCRATCH_PAGE:
                self.allocator.publish(key, page)
        self._slide(sequence)

    def fork(self, parent: Sequence) -> None:
        """The prompt of `parent` is computed: its forks join as running, sharing its pages until they write to them."""
        forks, parent.forks = parent.forks, []
        for sequence in forks:
            if sequence.finished:
                continue
            self._queue.accompany(sequence, parent)
            if self.gate is not None and sequence.adapter is not None:
                self.gate.share(sequence.adapter)
            sequence.computed = len(sequence) - 1
            sequence.reused = sequence.computed
            sequence.pages = list(parent.pages)
            if self.allocator is not None:
                self.allocator.share(sequence.pages)
            insort(self._running, sequence, key=_rank)

    def distrust(self, sequence: Sequence) -> list[int]:
        """Pages of a sequence that leaves early, or went wrong, whose numbers nobody has seen to be sound.

        They can no longer be found by others, and are to be cleared: a NaN would outlive the sequence, even where it is masked.
        """
        if self.allocator is None:
            return []
        # An answer vouches for what it was made of; without one, only what was found in the cache is known.
        vouched = len(sequence) - 1 if sequence.output else sequence.reused
        pages = sequence.pages[vouched // self.allocator.page_size :]
        mine = [page for page in pages if self.allocator.holders(page) == 1]
        for page in mine:
            self.allocator.prefixes.forget(page)
        return mine

    def check(self) -> None:
        """Prove the invariants between sequences and pages; AssertionError otherwise."""
        ranks = [sequence.rank for sequence in self._running]
        assert ranks == sorted(set(ranks)), "running sequences are out of order"
        self._queue.check()
        if self.allocator is not None:
            for sequence in self._running:
                held = len(sequence.pages) * self.allocator.page_size
                assert sequence.computed <= held, "more tokens computed than pages hold"
            self.allocator.check(sequence.pages for sequence in self._running)

    def _continue(self, sequence: Sequence, draft: _Draft) -> None:
        """The next chunk of a running sequence, taking pages from the last by rank when there are no more."""
        length = self._length(sequence, draft.budget)
        if sequence.drafter is not None and sequence.remaining == 1:
            length += self._guess(sequence, draft.budget - length)
        while not self._reserve(sequence, length, draft):
            victim = self._running[-1]
            draft.drop(victim)
            draft.clear(self.distrust(victim))
            self._preempt(victim)
            if victim is sequence:
                return
        drafted = len(sequence.draft)
        draft.add(Chunk(sequence, sequence.computed, length, drafted))

    def _guess(self, sequence: Sequence, budget: int) -> int:
        """Let the sequence guess ahead, as far as budget and its own limit of tokens go; the number of guesses."""
        assert sequence.drafter is not None
        assert sequence.stop is not None
        sequence.draft = []
        sequence.drafter.extend(sequence.tokens(len(sequence.drafter), len(sequence)))
        room = min(budget, sequence.stop.max_tokens - len(sequence.output) - 1)
        sequence.draft = sequence.drafter.guess(room) if room > 0 else []
        return len(sequence.draft)

    def _admit_all(self, draft: _Draft) -> None:
        """Let waiting sequences run by rank, until one does not fit. Those without their adapter are passed over."""
        if self.gate is not None:
            self.gate.start_plan()
        aside: list[Sequence] = []
        while not draft.full and len(self._running) < self.max_rows and len(aside) < LOOK_PAST:
            sequence = self._queue.first()
            if sequence is None:
                break
            if not self._enter(sequence):
                aside.append(self._queue.pop())
            elif not self._admit(sequence, draft):
                self._exit(sequence)
                break
        self._queue.put_back(aside)
        self.blocked = bool(aside)

    def _admit(self, sequence: Sequence, draft: _Draft) -> bool:
        """Let the first waiting sequence run; False when it does not fit."""
        if self.allocator is None:
            if sequence.remaining > draft.budget and draft.chunks:
                return False
            length = sequence.remaining
        else:
            self._reuse(sequence)
            length = self._length(sequence, draft.budget)
            if not self._reserve(sequence, length, draft):
                self._forget(sequence)
                return False
        self._queue.serve()
        insort(self._running, sequence, key=_rank)
        draft.add(Chunk(sequence, sequence.computed, length))
        return True

    def _enter(self, sequence: Sequence) -> bool:
        return self.gate is None or sequence.adapter is None or self.gate.acquire(sequence.adapter)

    def _exit(self, sequence: Sequence) -> None:
        if self.gate is not None and sequence.adapter is not None:
            self.gate.release(sequence.adapter)

    def _stop(self, sequence: Sequence) -> None:
        """A running sequence runs no longer."""
        self._running.remove(sequence)
        self._exit(sequence)

    def _length(self, sequence: Sequence, budget: int) -> int:
        length = min(sequence.remaining, budget)
        scored = sequence.prompt_logprobs is not None and sequence.computed < len(sequence.prompt)
        return min(length, self.scored_tokens) if scored else length

    def _reuse(self, sequence: Sequence) -> None:
        """Begin with the pages that the cache has for the tokens whose rows nobody reads."""
        assert self.allocator is not None
        size = self.allocator.page_size
        sequence.pages = self.allocator.match(sequence.keys(sequence.reusable // size, size))
        sequence.computed = sequence.reused = len(sequence.pages) * size

    def _reserve(self, sequence: Sequence, length: int, draft: _Draft) -> bool:
        """Pages for `length` more tokens, all of them the sequence's own to write; False when there are too few."""
        if self.allocator is None:
            return True
        needed = self.allocator.pages_for(sequence.computed + length) - len(sequence.pages)
        at = sequence.computed // self.allocator.page_size
        shared = at < len(sequence.pages) and self.allocator.holders(sequence.pages[at]) > 1
        pages = self.allocator.allocate(max(needed, 0) + shared)
        if pages is None:
            return False
        if shared:  # copy on write: the page that it shares with the other answers to its prompt
            mine = pages.pop()
            draft.copies.append((sequence.pages[at], mine))
            self.allocator.release([sequence.pages[at]])
            sequence.pages[at] = mine
        sequence.pages += pages
        return True

    def _slide(self, sequence: Sequence) -> None:
        """Give back pages that lie wholly behind the widest window of the next token."""
        if self.window is None or self.allocator is None or sequence.forks:  # forks begin a token earlier
            return
        behind = max(sequence.computed + 1 - self.window, 0) // self.allocator.page_size
        for at in reversed(range(min(behind, len(sequence.pages)))):
            if sequence.pages[at] == SCRATCH_PAGE:
                break
            self.allocator.release([sequence.pages[at]])
            sequence.pages[at] = SCRATCH_PAGE

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        sequence.preemptions += 1
        self._forget(sequence)
        self._queue.put_back([sequence])

    def _forget(self, sequence: Sequence) -> None:
        """Everything computed is lost, and computed again when the sequence runs next."""
        self._release(sequence)
        sequence.computed = 0
        sequence.draft = []
        sequence.part = None
        if len(sequence.prompt_scores) < len(sequence.prompt) - 1:
            sequence.prompt_scores = []

    def _release(self, sequence: Sequence) -> None:
        if self.allocator is not None and sequence.pages:
            self.allocator.release(sequence.pages)
        sequence.pages = []


LOOK_PAST = 64
"""How many waiting sequences without their adapter a plan looks past, so that a long queue costs it nothing."""


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
