"""The step loop of one engine.

Decides what a step means for each sequence: plan, run, accept, emit. Single-threaded; `worker` gives it a thread.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from lorax_core.engine.detokenizer import Detokenizer, TextDecoder
from lorax_core.engine.drafting import Proposals
from lorax_core.engine.runner import Answer, Runner
from lorax_core.engine.sampler import Picked
from lorax_core.engine.scheduler import Chunk, Scheduler, StepPlan
from lorax_core.engine.sequence import Sequence, Update
from lorax_core.engine.stopping import StopText
from lorax_core.errors import CapacityError, LoraxError, StepError
from lorax_core.types import FinishReason

if TYPE_CHECKING:
    from lorax_core.adapters.residency.handle import AdapterHandle

_log = logging.getLogger(__name__)


class EngineLoop:
    """Living sequences and the steps that move them on.

    Sequences learn of their progress through their `sink`. With no `decoder` completions have token ids and no text.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, decoder: TextDecoder | None = None) -> None:
        self.scheduler = scheduler
        self.steps = 0
        self._runner = runner
        self._decoder = decoder
        self._texts: dict[Sequence, tuple[Detokenizer, StopText]] = {}

    @property
    def busy(self) -> bool:
        """Whether any sequence is alive."""
        return len(self.scheduler) > 0

    def add(self, sequence: Sequence) -> None:
        """A sequence joins; it takes part from the next step on, and its forks once its prompt is computed."""
        for one in (sequence, *sequence.forks):
            if self._decoder is not None and one.stop is not None:
                self._texts[one] = (Detokenizer(self._decoder), StopText(one.stop.strings))
        self.scheduler.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """A sequence leaves without an answer; its pages are free before the next step. No-op once it has finished."""
        if not sequence.finished:
            self._runner.clear(self.scheduler.distrust(sequence))
            self._leave(sequence)

    def warmup(self, longest: int) -> None:
        """Compute the largest step that can come, once; `longest` is the longest sequence in tokens.

        Raises CapacityError when it does not fit in memory; living sequences are not touched.
        """
        tokens = min(self.scheduler.max_tokens, longest) if self.scheduler.allocator is not None else longest
        try:
            self._runner.warmup(tokens, self.scheduler.max_rows)
        except RuntimeError as error:  # torch's out-of-memory errors are of this kind
            raise CapacityError(
                f"a step of {tokens} tokens does not fit in memory: {error}",
                hint="load(..., max_batch_tokens=...) with less, or a smaller KV cache",
            ) from error

    def fail(self, adapter: AdapterHandle, error: LoraxError) -> None:
        """Sequences of an adapter that cannot be had end with the error."""
        for sequence in [one for one in self.scheduler if one.adapter is adapter]:
            self._runner.clear(self.scheduler.distrust(sequence))
            self._emit(sequence, Update(error=error))

    def step(self) -> bool:
        """One forward pass, and what follows from it. False when there is nothing to compute until an adapter arrives."""
        plan = self.scheduler.plan()
        if not plan.chunks:
            return not self.scheduler.blocked
        self.steps += 1
        answers = self._run(plan)
        for chunk in plan.chunks:
            answer = answers[chunk.sequence]
            try:
                update = answer if isinstance(answer, Update) else self._accept(chunk, answer)
            except Exception as error:  # a tokenizer that cannot read its own tokens, say
                update = _broken(error)
            if update is not None:
                self._emit(chunk.sequence, update)
        return True

    def _run(self, plan: StepPlan) -> dict[Sequence, Answer | Update]:
        """Answers of a plan. When the step breaks, each chunk is tried alone: only those that break alone end with an error."""
        try:
            answers: dict[Sequence, Answer | Update] = dict(self._runner.run(plan))
        except Exception as error:
            if len(plan.chunks) == 1:
                return {plan.chunks[0].sequence: _broken(error)}
            _log.warning("a step over %d sequences failed (%r); each is tried alone", len(plan.chunks), error)
            answers = {}
            for chunk in plan.chunks:
                copies = tuple((old, new) for old, new in plan.copies if new in chunk.sequence.pages)
                answers |= self._run(StepPlan((chunk,), copies))
        return {chunk.sequence: Answer() for chunk in plan.chunks} | answers

    def _accept(self, chunk: Chunk, answer: Answer) -> Update | None:
        """Take an answer into the sequence and say what is new; None when nothing is yet."""
        sequence = chunk.sequence
        sequence.part = answer.part if answer.part is not None else sequence.part
        sequence.prompt_scores += answer.prompt_scores
        if not answer.picked:
            if answer.values is not None and not np.isfinite(answer.values).all():
                self._runner.clear(self.scheduler.distrust(sequence))
                return Update(error=StepError("the model gave NaN or infinite values", results=[]))
            self.scheduler.advance(chunk)
            return Update(answer=answer.values) if answer.values is not None else None
        update = self._take(sequence, answer.picked)
        if update.error is not None:
            self._runner.clear(self.scheduler.distrust(sequence))
            return update
        accepted = max(len(update.token_ids) - 1, 0)
        sequence.accepted_drafts += accepted
        self.scheduler.advance(chunk, accepted)
        if isinstance(sequence.drafter, Proposals):
            sequence.drafter.propose(answer.guesses)
        if sequence.forks:
            self.scheduler.fork(sequence)
        return update

    def _take(self, sequence: Sequence, picked: tuple[Picked, ...]) -> Update:
        """New tokens, one after the other, until one ends the completion."""
        tokens: list[int] = []
        text, reason = "", None
        for one in picked:
            if one.token_id is None:
                return Update(error=StepError(one.fault, results=[]))
            tokens.append(one.token_id)
            piece, reason = self._next(sequence, one.token_id)
            text += piece
            if reason is not None:
                break
        scores = tuple(one.logprobs for one in picked[: len(tokens)] if one.logprobs is not None)
        return Update(token_ids=tuple(tokens), logprobs=scores, text=text, finish_reason=reason)

    def _next(self, sequence: Sequence, token: int) -> tuple[str, FinishReason | None]:
        """One new token: the text that it lets out, and whether it ends the completion."""
        rule = sequence.stop
        assert rule is not None
        sequence.output.append(token)
        sequence.output_counts[token] += 1
        stopped = token in rule.token_ids and len(sequence.output) > rule.min_tokens
        if sequence.grammar is not None and not stopped:
            sequence.grammar.advance(token)
            stopped = sequence.grammar.complete
            ended_by_token = False
        else:
            ended_by_token = stopped
        reason = FinishReason.STOP if stopped else None
        if reason is None and len(sequence.output) >= rule.max_tokens:
            reason = FinishReason.LENGTH
        if sequence not in self._texts:
            return "", reason
        detokenizer, stop_text = self._texts[sequence]
        # A stop token that is not special has text of its own, which is no part of the answer.
        piece = "" if ended_by_token else detokenizer.push(token)
        if reason is not None:
            piece += detokenizer.flush()
        text, met = stop_text.feed(piece, len(sequence.output) >= rule.min_tokens)
        if met:
            return text, FinishReason.STOP
        return text + stop_text.flush() if reason is not None else text, reason

    def _emit(self, sequence: Sequence, update: Update) -> None:
        if update.last:
            self._leave(sequence)
        try:
            sequence.sink(update)
        except Exception:
            _log.exception("a caller could not take its answer; its request is dropped")
            self.abort(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self._texts.pop(sequence, None)
        self.scheduler.remove(sequence)
        forks = [fork for fork in sequence.forks if not fork.finished]
        sequence.forks = []
        if forks:  # the prompt was not computed for them: the first takes it on
            forks[0].forks = forks[1:]
            self.scheduler.add(forks[0])


def _broken(error: Exception) -> Update:
    if isinstance(error, LoraxError):
        return Update(error=error)
    told = StepError(f"the step failed: {type(error).__name__}: {error}", results=[])
    told.__cause__ = error
    return Update(error=told)
