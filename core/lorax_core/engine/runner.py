"""One step on the device: batch in, answers out.

Decides how a plan is computed and read back. Changes no sequence, so a step that failed can be tried again in smaller pieces.
Knows nothing of stopping, text or who waits for the answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lorax_core.adapters.base import Bound
from lorax_core.adapters.lora_kernels.base import LoraKernel
from lorax_core.attention.base import AttentionBackend
from lorax_core.engine.batcher import Batcher, scores_prompt
from lorax_core.engine.sampler import Draw, Picked, sample, score
from lorax_core.engine.scheduler import Chunk, StepPlan
from lorax_core.engine.sequence import Sequence
from lorax_core.engine.stopping import StopRule
from lorax_core.kvcache.allocator import SCRATCH_PAGE
from lorax_core.kvcache.pool import KVPool
from lorax_core.modeling.batch import HeadRows
from lorax_core.modeling.heads import Head
from lorax_core.modeling.model import Model
from lorax_core.types import Task, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Answer:
    """What a step gave one sequence.

    `picked`: a token for the newest row and each right guess before it, in order. `prompt_scores`: of the prompt tokens that
    this chunk's rows predict. `part`: what the head made of the rows so far; `values`: of the whole text, on the host.
    """

    picked: tuple[Picked, ...] = ()
    prompt_scores: tuple[TokenLogprobs, ...] = ()
    guesses: tuple[int, ...] = ()  # of the adapter's speculator, for the tokens after the last of `picked`
    part: Any = None
    values: Any = None  # float32 numpy


class Runner:
    """Runs plans over one model with one attention backend."""

    def __init__(
        self,
        model: Model,
        backend: AttentionBackend,
        pool: KVPool | None,
        adapters: Mapping[str, Bound] = MappingProxyType({}),
        kernel: LoraKernel | None = None,
    ) -> None:
        self._model = model
        self._backend = backend
        self._pool = pool
        self._batcher = Batcher(model, pool, adapters, kernel)
        self._bound = adapters
        self._specs = model.attention_specs

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> dict[Sequence, Answer]:
        """Compute a plan; an answer for each sequence whose rows were read."""
        if self._pool is not None:
            self.clear(list(plan.clears))
            self._pool.copy(plan.copies)
        packed = self._batcher.pack(plan)
        packed.batch.attention = self._backend
        self._backend.plan(packed.batch, self._specs)
        output = self._model(packed.batch)
        answers: dict[Sequence, Answer] = {}
        for group, rows, read in zip(packed.batch.head_rows, output.answers, output.read, strict=True):
            chunks = [packed.chunks[index] for index in group.sequences]
            if group.task is Task.GENERATE:
                generated = self._generated(chunks, rows, group)
                answers |= generated if read is None else self._guessed(chunks, read, group, generated)
            elif group.task is not None:
                answers |= self._joined(group.head or self._model.head(group.task), chunks, rows, group)
        unread = [chunk for chunk in packed.chunks if chunk.final and chunk.sequence not in answers]
        answers |= {chunk.sequence: Answer(part=chunk.sequence.part) for chunk in unread}
        return self._finished([chunk for chunk in packed.chunks if chunk.final], answers)

    def warmup(self, tokens: int, rows: int) -> None:
        """Run the largest step once: a text of `tokens` tokens, then `rows` tokens of different texts.

        Nothing of a living sequence is touched: everything is written to the scratch page.
        """
        for length, count in ((tokens, 1), (1, rows)):
            chunks = [Chunk(self._dummy(length), 0, length) for _ in range(count)]
            self.run(StepPlan(tuple(chunks)))
        self.clear([SCRATCH_PAGE])

    def _dummy(self, length: int) -> Sequence:
        task = self._model.tasks[0]
        prompt = [0] * length
        span = None if task is Task.GENERATE else self._model.head(task).span(prompt, 0)
        sequence = Sequence(task=task, prompt=prompt, span=span, stop=StopRule(1) if span is None else None)
        if self._pool is not None:
            sequence.pages = [SCRATCH_PAGE] * -(-length // self._pool.page_size)
        return sequence

    def clear(self, pages: list[int]) -> None:
        """Forget what pages of the cache hold."""
        if self._pool is not None and pages:
            self._pool.clear(pages)

    def _generated(self, chunks: list[Chunk], logits: Tensor, group: HeadRows) -> dict[Sequence, Answer]:
        """logits `[rows, vocab]`, `group.counts` rows for each chunk, to tokens and scores of prompts."""
        starts = [sum(group.counts[:i]) for i in range(len(chunks))]
        drawn: list[int] = []
        draws: list[Draw] = []
        for chunk, start, count in zip(chunks, starts, group.counts, strict=True):
            if chunk.final:
                drawn += range(start + count - 1 - chunk.drafted, start + count)
                draws += _draws(chunk)
        at = torch.tensor(drawn, device=logits.device, dtype=torch.int64)
        picked = iter(sample(logits if len(drawn) == len(logits) else logits[at], draws)) if drawn else iter(())
        answers: dict[Sequence, Answer] = {}
        for chunk, start, count in zip(chunks, starts, group.counts, strict=True):
            own = [next(picked) for _ in range(1 + chunk.drafted)] if chunk.final else []
            scores = _prompt_scores(chunk, logits[start : start + count]) if scores_prompt(chunk) else ()
            answers[chunk.sequence] = Answer(picked=_verified(own, chunk.sequence.draft), prompt_scores=scores)
        return answers

    def _guessed(
        self, chunks: list[Chunk], hidden: Tensor, group: HeadRows, answers: dict[Sequence, Answer]
    ) -> dict[Sequence, Answer]:
        """Answers with guesses at what follows, read off the last row whose token stands: hidden `[rows, hidden]`."""
        assert group.speculator is not None
        at: dict[Sequence, int] = {}
        for chunk, stop in zip(chunks, itertools.accumulate(group.counts), strict=True):
            if answers[chunk.sequence].picked:
                at[chunk.sequence] = stop - 1 - chunk.drafted + len(answers[chunk.sequence].picked) - 1
        if at:
            rows = hidden[torch.tensor(list(at.values()), device=hidden.device)]
            guesses = group.speculator.draft(rows, self._model.base_logits).tolist()
            for sequence, tokens in zip(at, guesses, strict=True):
                answers[sequence] = replace(answers[sequence], guesses=tuple(tokens))
        return answers

    def _joined(self, head: Head, chunks: list[Chunk], answers: Tensor, group: HeadRows) -> dict[Sequence, Answer]:
        """A step's answers added to what earlier chunks of the same texts gave."""
        parts = answers.unbind(0) if head.pooled else torch.split(answers, list(group.counts))
        joined: dict[Sequence, Answer] = {}
        for chunk, part in zip(chunks, parts, strict=True):
            before = chunk.sequence.part
            if before is not None:
                part = before + part if head.pooled else torch.cat((before, part))
            joined[chunk.sequence] = Answer(part=part)
        return joined

    def _head(self, sequence: Sequence) -> Head:
        """The adapter's own head where the sequence asks for it, else the model's."""
        if sequence.head is not None and sequence.adapter is not None:
            own = self._bound[sequence.adapter.identity].head
            assert own is not None
            return own
        return self._model.head(sequence.task)

    def _finished(self, chunks: list[Chunk], answers: dict[Sequence, Answer]) -> dict[Sequence, Answer]:
        """Whole texts to their answers, head by head."""
        groups: dict[Head, list[Sequence]] = {}
        for chunk in chunks:
            if chunk.sequence.span is not None:
                head = self._head(chunk.sequence)
                groups.setdefault(head, []).append(chunk.sequence)
        for head, group in groups.items():
            counts = [len(sequence.span) for sequence in group if sequence.span is not None]
            made = head.finish([answers[sequence].part for sequence in group], counts)
            for sequence, values in zip(group, made, strict=True):
                answers[sequence] = replace(answers[sequence], values=values.float().cpu().numpy().copy())
        return answers


def _draws(chunk: Chunk) -> list[Draw]:
    """How each row of a final chunk is decided: the newest token's, then one after each guess."""
    sequence = chunk.sequence
    one = sequence.sampling
    assert sequence.stop is not None
    draws: list[Draw] = []
    for guessed in range(1 + chunk.drafted):
        seen = None
        if one.counts_tokens:
            counts = sequence.output_counts.copy()
            counts.update(sequence.draft[:guessed])
            seen = {**dict.fromkeys(sequence.prompt, 0), **counts}
        early = len(sequence.output) + guessed < sequence.stop.min_tokens
        allowed = sequence.grammar.allowed() if sequence.grammar is not None else None
        banned = sequence.stop.token_ids if early else frozenset()
        draws.append(Draw(one, len(sequence) + guessed, seen, banned, allowed))
    return draws


def _verified(picked: list[Picked], draft: list[int]) -> tuple[Picked, ...]:
    """The decided tokens up to the first that a guess had wrong, that one included: each depends on those before."""
    right = 0
    while right < len(picked) - 1 and picked[right].token_id == draft[right]:
        right += 1
    return tuple(picked[: right + 1])


def _prompt_scores(chunk: Chunk, logits: Tensor) -> tuple[TokenLogprobs, ...]:
    """Scores of the prompt tokens that follow the rows of a chunk: logits `[chunk.length, vocab]`."""
    prompt = chunk.sequence.prompt
    tokens = prompt[chunk.start + 1 : chunk.stop + 1]
    found = score(logits[: len(tokens)], tokens, [chunk.sequence.prompt_logprobs] * len(tokens))
    return tuple(one for one in found if one is not None)
