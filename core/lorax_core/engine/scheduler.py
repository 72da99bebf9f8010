"""Who runs next.

Decides which tokens of which sequences make up a step, within a budget of tokens, rows and pages. Pure planning, without
tensors.

- Sequences that decode come first, a token each, so a long prompt never stalls running answers; prompts share what is left,
  by rank (turn, moved by priority), in chunks.
- A sequence whose adapter is not on the device waits for it, and those behind it whose adapters are there go first.
- A sequence starts with the cached pages that hold its first tokens.
- When pages run out, the running sequence with the highest rank is preempted and computed again later, so the first always
  finishes.
- Pages that no layer can see any more (behind the widest sliding window) are released.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections.abc import Iterator
from typing import Any, Protocol

from lorax_core.engine.plan import Chunk, PlanBuilder, StepPlan
from lorax_core.engine.queue import WaitingQueue
from lorax_core.engine.sequence import Sequence
from lorax_core.kvcache.allocator import SCRATCH_PAGE, PageAllocator


class AdapterGate(Protocol):
    """Which adapters are on the device. A sequence holds its adapter there from its admission until it leaves.

    The handles are the gate's own, as they stand in `Sequence.adapter`.
    """

    def start_plan(self) -> None:
        """A plan begins; adapters are asked for in the order of the queue."""

    def acquire(self, handle: Any) -> bool:
        """Hold an adapter; False while it is not on the device, and then it is being loaded."""

    def share(self, handle: Any) -> None:
        """Hold an adapter once more, beside a sequence that holds it."""

    def release(self, handle: Any) -> None:
        """Hold it once less."""


class Scheduler:
    """Plans steps over all living sequences.

    With an `allocator`, sequences hold pages and may be computed in chunks. Without one (bidirectional models) an input runs
    whole; one that is longer than `max_tokens` runs alone. `window` is the widest sliding window of the model in tokens,
    None when a layer sees everything. `scored_tokens` bounds chunks whose every row is scored, because a row of scores is as
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
        self.blocked = False  # whether the last plan left out a sequence whose adapter is not on the device
        self._running: list[Sequence] = []  # by rank
        self._zeros: list[int] = []  # pages for the next plan to zero
        self._queue = WaitingQueue()

    def __len__(self) -> int:
        return len(self._running) + len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._running
        yield from self._queue

    @property
    def waiting(self) -> int:
        """Sequences that have not started, or were preempted."""
        return len(self._queue)

    def add(self, sequence: Sequence) -> None:
        """A new sequence joins the queue."""
        self._queue.join(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence leaves, finished or cancelled; its pages are free before the next plan. Marks it finished."""
        if sequence.finished:
            return
        sequence.finished = True
        if sequence.ahead and self.allocator is not None:
            # Nobody reads the row that it has too many, so nobody would see a NaN in it. It is the last of its tokens.
            self._zeros.append(sequence.pages[-1])
        running = sequence in self._running
        if running:
            self._stop(sequence)
        if sequence.id:  # a fork that has not joined yet is not counted
            self._queue.depart(sequence, waiting=not running)
        self._release(sequence)

    def plan(self) -> StepPlan:
        """The next step. Pages that its tokens need are allocated already."""
        plan = PlanBuilder(self.max_tokens, self.max_rows, self._zeros)
        self._zeros = []
        decoding = [sequence for sequence in self._running if sequence.remaining == 1]
        prompts = [sequence for sequence in self._running if sequence.remaining > 1]
        for sequence in (*decoding, *prompts):
            if plan.full:
                break
            if sequence.pages or self.allocator is None:  # it has not just given them to one before it
                self._continue(sequence, plan)
        self._admit_all(plan)
        if not plan.chunks:  # nothing is computed, so nothing is zeroed
            self._zeros = plan.zeros
        return plan.build()

    def plan_ahead(self, plan: StepPlan) -> StepPlan | None:
        """The step after one that is in progress, whose tokens are not known yet; None where it must be waited for.

        All sequences decode on, a token each, without those that end by length. Nobody joins or makes room, and no sequence may
        need the host between two tokens. A sequence that turns out to have ended has a row too many, which nobody reads.
        """
        for chunk in plan.chunks:
            chunk.sequence.ahead = 0
        joining = len(self._queue) > 0 and len(self._running) < self.max_rows
        # A sequence that left since then is in the plan but does not run; one that runs and is not in it is in its prompt.
        going = {chunk.sequence: chunk for chunk in plan.chunks if not chunk.sequence.finished}
        if joining or self.allocator is None or len(going) != len(self._running):
            return None
        if any(one.span is not None or one.needs_host or not chunk.final for one, chunk in going.items()):
            return None
        chunks: list[Chunk] = []
        for sequence, chunk in going.items():
            assert sequence.stop is not None
            if len(sequence.output) + 1 >= sequence.stop.max_tokens:
                continue
            if not self._reserve_ahead(sequence, chunk.stop):
                return None
            chunks.append(Chunk(sequence, chunk.stop, 1, awaits=True))
        if not chunks:
            return None
        for chunk in chunks:
            chunk.sequence.ahead = 1
        zeros, self._zeros = tuple(self._zeros), []
        return StepPlan(tuple(chunks), zeros=zeros)

    def forgo(self, plan: StepPlan) -> None:
        """A step that was planned ahead could not be launched; its tokens are planned again."""
        for chunk in plan.chunks:
            chunk.sequence.ahead = 0
        self._zeros = [*plan.zeros, *self._zeros]

    def advance(self, chunk: Chunk, accepted: int = 0) -> None:
        """A chunk was computed, and `accepted` of its draft tokens were right: those count as computed.

        Full pages can be found by others from now on; pages of rejected draft tokens and behind the window are released.
        """
        sequence = chunk.sequence
        sequence.computed = chunk.stop - chunk.drafted + accepted
        sequence.draft, sequence.restarted = [], False
        if self.allocator is None:
            return
        size = self.allocator.page_size
        # Pages past this held only rejected draft tokens.
        needed = self.allocator.pages_for(sequence.computed + sequence.ahead)
        if len(sequence.pages) > needed:
            self.allocator.release(sequence.pages[needed:])
            del sequence.pages[needed:]
        # Only full pages: a partly filled one is still written to.
        full = min(sequence.computed, len(sequence)) // size
        first = chunk.start // size
        if first < full:
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
            # The last prompt token is computed again: its logits are what each fork samples its first token from.
            sequence.computed = len(sequence) - 1
            sequence.reused = sequence.computed
            sequence.pages = parent.pages[:]
            if self.allocator is not None:
                self.allocator.share(sequence.pages)
            insort(self._running, sequence, key=_rank)

    def invalidate(self, sequence: Sequence) -> None:
        """A sequence leaves early, or its values are not finite: its pages must not be reused, and the next plan zeroes them.

        A NaN would outlive the sequence otherwise, for it spreads even from where it is masked.
        """
        self._zeros += self._invalidated(sequence)

    def _invalidated(self, sequence: Sequence) -> list[int]:
        """The pages of a sequence whose numbers are not known to be sound, taken out of the index."""
        if self.allocator is None:
            return []
        # An answer shows that what it was computed from is sound; without one, only what was found in the cache is known.
        sound = len(sequence) - 1 if sequence.output else sequence.reused
        pages = sequence.pages[sound // self.allocator.page_size :]
        own = [page for page in pages if self.allocator.holders(page) == 1]
        for page in own:
            self.allocator.prefixes.forget(page)
        return own

    def check(self) -> None:
        """Prove the invariants between sequences and pages; AssertionError otherwise."""
        ranks = [sequence.rank for sequence in self._running]
        assert ranks == sorted(set(ranks)), "running sequences are out of order"
        self._queue.check()
        if self.allocator is not None:
            for sequence in self._running:
                held = len(sequence.pages) * self.allocator.page_size
                assert sequence.computed + sequence.ahead <= held, "more tokens computed than pages hold"
                last = sequence.pages[-1:] if sequence.ahead else ()
                assert all(self.allocator.holders(page) == 1 for page in last), "a shared page is written ahead"
            self.allocator.check(sequence.pages for sequence in self._running)

    def _continue(self, sequence: Sequence, plan: PlanBuilder) -> None:
        """The next chunk of a running sequence; preempts those with the highest rank while there are too few pages."""
        length = self._length(sequence, plan.budget)
        if sequence.drafter is not None and sequence.remaining == 1:
            length += self._draft(sequence, plan.budget - length)
        while not self._reserve(sequence, length, plan):
            victim = self._running[-1]
            # The victim may have a chunk in this plan, whose pages are about to be reused.
            plan.drop(victim)
            plan.zero(self._invalidated(victim))
            self._preempt(victim)
            if victim is sequence:
                return
        sequence.ahead = 0  # a row of a step that was void is overwritten now
        plan.add(Chunk(sequence, sequence.computed, length, len(sequence.draft)))

    def _draft(self, sequence: Sequence, budget: int) -> int:
        """Draft tokens as far as the budget and the sequence's own limit go; gives their number."""
        assert sequence.drafter is not None
        assert sequence.stop is not None
        sequence.draft = []
        sequence.drafter.extend(sequence.tokens(len(sequence.drafter), len(sequence)))
        # 1: a step gives one token more than the drafts it accepts.
        room = min(budget, sequence.stop.max_tokens - len(sequence.output) - 1)
        sequence.draft = sequence.drafter.draft(room) if room > 0 else []
        return len(sequence.draft)

    def _admit_all(self, plan: PlanBuilder) -> None:
        """Let waiting sequences run by rank, until one does not fit. Those whose adapter is not there are skipped."""
        if self.gate is not None:
            self.gate.start_plan()
        aside: list[Sequence] = []
        while not plan.full and len(self._running) < self.max_rows and len(aside) < LOOK_PAST:
            sequence = self._queue.first()
            if sequence is None:
                break
            if not self._acquire(sequence):
                aside.append(self._queue.pop())
            elif not self._admit(sequence, plan):
                self._release_adapter(sequence)
                break
        self._queue.put_back(aside)
        self.blocked = bool(aside)

    def _admit(self, sequence: Sequence, plan: PlanBuilder) -> bool:
        """Let the first waiting sequence run; False when it does not fit."""
        if self.allocator is None:
            # An input longer than any budget would never run otherwise.
            if sequence.remaining > plan.budget and plan.chunks:
                return False
            length = sequence.remaining
        else:
            self._reuse(sequence)
            length = self._length(sequence, plan.budget)
            if not self._reserve(sequence, length, plan):
                self._forget(sequence)
                return False
        self._queue.serve()
        insort(self._running, sequence, key=_rank)
        plan.add(Chunk(sequence, sequence.computed, length))
        return True

    def _acquire(self, sequence: Sequence) -> bool:
        return self.gate is None or sequence.adapter is None or self.gate.acquire(sequence.adapter)

    def _release_adapter(self, sequence: Sequence) -> None:
        if self.gate is not None and sequence.adapter is not None:
            self.gate.release(sequence.adapter)

    def _stop(self, sequence: Sequence) -> None:
        """Take a sequence out of those that run."""
        self._running.remove(sequence)
        self._release_adapter(sequence)

    def _length(self, sequence: Sequence, budget: int) -> int:
        length = min(sequence.remaining, budget)
        scored = sequence.prompt_logprobs is not None and sequence.computed < len(sequence.prompt)
        return min(length, self.scored_tokens) if scored else length

    def _reuse(self, sequence: Sequence) -> None:
        """Start with the cached pages of the first tokens, as far as their rows are not read."""
        assert self.allocator is not None
        size = self.allocator.page_size
        sequence.pages = array("i", self.allocator.match(sequence.keys(sequence.reusable // size, size)))
        sequence.computed = sequence.reused = len(sequence.pages) * size

    def _reserve(self, sequence: Sequence, length: int, plan: PlanBuilder) -> bool:
        """Pages for `length` more tokens, all of them the sequence's own to write; False when there are too few."""
        if self.allocator is None:
            return True
        # Only the page at `computed` can be shared and written: the pages after it are new.
        needed = self.allocator.pages_for(sequence.computed + length) - len(sequence.pages)
        at = sequence.computed // self.allocator.page_size
        shared = at < len(sequence.pages) and self.allocator.holders(sequence.pages[at]) > 1
        pages = self.allocator.allocate(max(needed, 0) + shared)
        if pages is None:
            return False
        if shared:  # copy on write: other answers to the same prompt read this page
            mine = pages.pop()
            plan.copies.append((sequence.pages[at], mine))
            self.allocator.release([sequence.pages[at]])
            sequence.pages[at] = mine
        sequence.pages.extend(pages)
        return True

    def _reserve_ahead(self, sequence: Sequence, start: int) -> bool:
        """A page of its own for the token at `start`; False when there is none."""
        assert self.allocator is not None
        # The step in progress writes the token before: to a page of its own, and one that is not full nobody else finds.
        if start < len(sequence.pages) * self.allocator.page_size:
            return True
        pages = self.allocator.allocate(1)
        sequence.pages.extend(pages or ())
        return pages is not None

    def _slide(self, sequence: Sequence) -> None:
        """Release pages that lie wholly behind the widest window of the next token."""
        if self.window is None or self.allocator is None or sequence.forks:  # forks start a token earlier
            return
        behind = max(sequence.computed + 1 - self.window, 0) // self.allocator.page_size
        # From the newest: what lies before a scratch page was released by an earlier step.
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
        """Drop everything computed; it is computed again when the sequence runs next."""
        self._release(sequence)
        sequence.computed = sequence.ahead = 0
        sequence.draft = []
        sequence.restarted = True
        # Partial scores would be appended twice when the prompt is computed again.
        if len(sequence.prompt_scores) < len(sequence.prompt) - 1:
            sequence.prompt_scores = []

    def _release(self, sequence: Sequence) -> None:
        if self.allocator is not None and sequence.pages:
            self.allocator.release(sequence.pages)
        sequence.pages = array("i")


LOOK_PAST = 64
"""How many waiting sequences whose adapter is not there a plan skips, which bounds its cost in a long queue."""


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
