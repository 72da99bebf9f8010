"""What a step consists of, before it becomes tensors.

Decides the types that the scheduler fills and the bookkeeping of a plan in the making. Knows nothing of who runs next, and
nothing of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lorax_core.engine.sequence import Sequence


@dataclass(slots=True)  # not frozen: that takes five times as long, at each row
class Chunk:
    """Tokens `start` to `start + length` of a sequence, to be computed now; the last `drafted` of them are draft tokens.

    `awaits`: it is one token, which the step before this one samples.
    """

    sequence: Sequence
    start: int
    length: int
    drafted: int = 0
    awaits: bool = False

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def final(self) -> bool:
        """Whether this chunk reaches the newest token, so that the sequence gets its answer."""
        return self.awaits or self.stop - self.drafted == len(self.sequence)

    @property
    def scores_prompt(self) -> bool:
        """Whether every row of the chunk is read, because the prompt's own tokens are scored.

        Once: a prompt that is computed again after a preemption has its scores.
        """
        last = len(self.sequence.prompt) - 1
        return (
            self.sequence.prompt_logprobs is not None and self.start < last and len(self.sequence.prompt_scores) < last
        )

    @property
    def reads(self) -> range:
        """Rows of the chunk, counted from its own start, that the sequence's head reads."""
        span = self.sequence.span
        if span is not None:
            return range(max(span.start - self.start, 0), min(span.stop - self.start, self.length))
        if self.scores_prompt:
            return range(self.length)
        return range(self.length - 1 - self.drafted if self.final else self.length, self.length)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The chunks of one step, by rank.

    Before anything is computed, pages in `zeros` are zeroed (their last holder left before its numbers were known to be
    sound), then pages in `copies`, `(from, to)` each, are copied.
    """

    chunks: tuple[Chunk, ...]
    copies: tuple[tuple[int, int], ...] = ()
    zeros: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


@dataclass(slots=True)
class PlanBuilder:
    """A plan in the making: what is in it, and the budget of tokens and rows that is left."""

    budget: int
    rows: int
    zeros: list[int]
    chunks: dict[Sequence, Chunk] = field(default_factory=dict)
    copies: list[tuple[int, int]] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        """One chunk more."""
        self.chunks[chunk.sequence] = chunk
        self.budget -= chunk.length
        self.rows -= 1

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence's chunk out again; no-op when it has none."""
        chunk = self.chunks.pop(sequence, None)
        if chunk is not None:
            # Returned to the budget, so that another sequence of this plan can use it.
            self.budget += chunk.length
            self.rows += 1

    def zero(self, pages: list[int]) -> None:
        """Pages that a preempted sequence gave up."""
        # A page that another sequence is about to copy keeps its content until then; who writes to it next overwrites it.
        self.copies = [(old, new) for old, new in self.copies if new not in pages]
        kept = {old for old, _ in self.copies}
        self.zeros += [page for page in pages if page not in kept]

    @property
    def full(self) -> bool:
        return self.budget < 1 or self.rows < 1

    def build(self) -> StepPlan:
        """The plan, its chunks by rank."""
        chunks = sorted(self.chunks.values(), key=lambda chunk: chunk.sequence.rank)
        return StepPlan(tuple(chunks), tuple(self.copies), tuple(self.zeros))
