"""A step as plain data: what the scheduler's side sends to the side that has the model.

Decides what crosses that line. Everything here pickles and holds no sequence, grammar, drafter or tensor, so the model may
live in another thread or process.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from lorax_core.engine.plan import Chunk, StepPlan
from lorax_core.engine.sequence import Sampling, Sequence, Stage, TokenCounts
from lorax_core.types import Task


@dataclass(slots=True)  # not frozen: that takes five times as long, at each row
class SamplingRow:
    """A row whose next token is sampled.

    `position` is that of the new token in its sequence. `counts` are the tokens before it, where penalties ask for them.
    `banned` tokens cannot be sampled; `allowed` are the tokens that a grammar permits, one bit each, the lowest first.
    """

    sampling: Sampling
    position: int
    counts: TokenCounts | None = None
    banned: tuple[int, ...] = ()
    allowed: bytes | None = None


@dataclass(frozen=True, slots=True)
class HeadRead:
    """Rows of a chunk, counted from its start, that a head reads; without a `task` hidden rows themselves are the answer.

    `own_head` is the head of the chunk's adapter. `speculates` asks the adapter for draft tokens as well.
    """

    task: Task | None
    rows: range
    own_head: bool = False
    speculates: bool = False


@dataclass(slots=True)  # not frozen: that takes five times as long, at each row
class ChunkInput:
    """One sequence's share of a step.

    - `tokens` are those to compute, from position `start` on, draft tokens last (`drafts` of them).
    - `awaits_token`: the last of `tokens` is not known yet; it is what the step before samples for this sequence.
    - `pages` are all pages of the sequence, in order; page 0 stands for one that was given back.
    - `reads` says which heads read which rows.
    - `sampled` has a row for the newest token and one for each draft token, in a chunk that reaches the newest token.
    - `scored` are the prompt tokens that the chunk's first rows predict, to be scored with the `prompt_logprobs` most likely.
    - `stage` says how far the rows of the whole input go.
    - `pooled_rows` is how many rows of the whole input its head reads, in the chunk that completes it; else None.
    - `restarted`: what earlier chunks of the sequence left in the runner is void.
    """

    sequence: int
    start: int
    tokens: array[int]
    reads: tuple[HeadRead, ...]
    pages: array[int] = field(default_factory=lambda: array("i"))
    token_types: array[int] | None = None
    adapter: str | None = None
    drafts: int = 0
    awaits_token: bool = False
    sampled: tuple[SamplingRow, ...] = ()
    scored: array[int] = field(default_factory=lambda: array("q"))
    prompt_logprobs: int | None = None
    task: Task = Task.GENERATE
    own_head: bool = False
    stage: Stage = Stage.FINISHED
    pooled_rows: int | None = None
    restarted: bool = True


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step.

    Pages in `zeros` are zeroed, then `copies` `(from, to)` are made, then the chunks are computed. What the runner keeps of
    `ended` sequences is dropped.
    """

    chunks: tuple[ChunkInput, ...]
    copies: tuple[tuple[int, int], ...] = ()
    zeros: tuple[int, ...] = ()
    ended: tuple[int, ...] = ()


def step_input(plan: StepPlan, ended: Iterable[int] = ()) -> StepInput:
    """A plan as plain data. Chunks of one adapter are put side by side, the base first, so that each is one product."""
    chunks = sorted(plan.chunks, key=lambda chunk: chunk.sequence.salt)
    return StepInput(tuple(chunk_input(chunk) for chunk in chunks), plan.copies, plan.zeros, tuple(ended))


def chunk_input(chunk: Chunk) -> ChunkInput:
    """One chunk as plain data."""
    sequence, reads = chunk.sequence, chunk.reads
    types = sequence.token_types
    generates = sequence.span is None
    scores = chunk.scores_prompt
    return ChunkInput(
        sequence=sequence.id,
        start=chunk.start,
        tokens=array("q", [0] if chunk.awaits else sequence.tokens(chunk.start, chunk.stop)),
        reads=_reads(_task(sequence), reads, sequence.own_head, sequence.speculates) if reads else (),
        pages=sequence.pages[:],
        token_types=array("q", types[chunk.start : chunk.stop]) if types is not None else None,
        adapter=sequence.adapter.identity if sequence.adapter is not None else None,
        drafts=chunk.drafted,
        awaits_token=chunk.awaits,
        sampled=_sampled(chunk) if generates and chunk.final else (),
        scored=array("q", sequence.prompt[chunk.start + 1 : chunk.stop + 1] if scores else ()),
        prompt_logprobs=sequence.prompt_logprobs if scores else None,
        task=sequence.task,
        own_head=sequence.own_head,
        stage=sequence.stage,
        pooled_rows=len(sequence.span) if sequence.span is not None and chunk.final else None,
        restarted=sequence.restarted,
    )


def _task(sequence: Sequence) -> Task | None:
    """Whose head reads the rows of a step; None where no head does."""
    return None if sequence.stage is Stage.HIDDEN else sequence.task


@lru_cache(maxsize=1024)  # while they decode, nearly all sequences read the same
def _reads(task: Task | None, rows: range, own_head: bool, speculates: bool) -> tuple[HeadRead, ...]:
    return (HeadRead(task, rows, own_head, speculates),)


def _sampled(chunk: Chunk) -> tuple[SamplingRow, ...]:
    """How each row of a final chunk is sampled: the newest token's, then one after each draft token."""
    sequence = chunk.sequence
    return tuple(_sampling_row(sequence, drafted, chunk.awaits) for drafted in range(1 + chunk.drafted))


def _sampling_row(sequence: Sequence, drafted: int, awaited: bool) -> SamplingRow:
    assert sequence.stop is not None
    early = len(sequence.output) + drafted + awaited < sequence.stop.min_tokens
    return SamplingRow(
        sequence.sampling,
        len(sequence) + drafted + awaited,
        sequence.counts.snapshot(sequence.draft[:drafted]) if sequence.counts is not None else None,
        tuple(sorted(sequence.stop.token_ids)) if early else (),
        sequence.grammar.allowed() if sequence.grammar is not None else None,
    )
