"""The step loop of one engine.

Decides what a step means for each sequence: plan, run, accept, emit. Single-threaded; `worker` gives it a thread.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from lorax_core.engine.detokenizer import Detokenizer, TextDecoder
from lorax_core.engine.drafting import Proposals
from lorax_core.engine.plan import Chunk, StepPlan
from lorax_core.engine.runner import Answer, PendingStep, Runner
from lorax_core.engine.sampler import SampledToken
from lorax_core.engine.scheduler import Scheduler
from lorax_core.engine.sequence import AdapterRef, Sequence, SequenceUpdate
from lorax_core.engine.stats import StepStats, Totals
from lorax_core.engine.step_input import step_input
from lorax_core.engine.stopping import StopText
from lorax_core.engine.wakes import woken_together
from lorax_core.errors import CapacityError, LoraxError, StepError
from lorax_core.types import FinishReason

_log = logging.getLogger(__name__)
_HTTP_FLOAT32: Final = "the server may be started with --dtype float32, in which fewer numbers overflow"


class EngineLoop:
    """Living sequences and the steps that move them on.

    A sequence's `sink` receives its updates. With no `decoder` completions have token ids and no text. `totals` has the
    numbers of the steps so far, and `last_step` those of the last one. With `ahead` the next decoding step is launched before
    the result of the one in progress is read, so that the device does not wait for the host.
    """

    def __init__(
        self, scheduler: Scheduler, runner: Runner, decoder: TextDecoder | None = None, *, ahead: bool = False
    ) -> None:
        self.scheduler = scheduler
        self.totals = Totals()
        self.last_step: StepStats | None = None
        self._runner = runner
        self._decoder = decoder
        self._texts: dict[Sequence, tuple[Detokenizer, StopText]] = {}
        self._ahead = ahead
        self._following: _Launched | None = None  # what was launched ahead of the last result
        self._ended: list[int] = []  # sequences that left since the last step, for the runner to forget

    @property
    def busy(self) -> bool:
        """Whether any sequence is alive."""
        return len(self.scheduler) > 0

    def add(self, sequence: Sequence) -> None:
        """Add a sequence; it takes part from the next step on, and its forks once its prompt is computed."""
        for one in (sequence, *sequence.forks):
            decoder = one.decoder or self._decoder
            if decoder is not None and one.stop is not None:
                self._texts[one] = (Detokenizer(decoder), StopText(one.stop.strings))
        self.scheduler.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Take a sequence out without an answer; its pages are free before the next step. No-op once it has finished."""
        if not sequence.finished:
            self.scheduler.invalidate(sequence)
            self._leave(sequence)
            if self.last_step is not None:  # no step may follow that would count what is left
                self.last_step = replace(self.last_step, **self._load())

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
                hint="load with a smaller max_batch_tokens, or a smaller KV cache",
            ) from error

    def fail(self, adapter: AdapterRef, error: LoraxError) -> None:
        """Sequences of an adapter that cannot be loaded end with the error."""
        for sequence in [one for one in self.scheduler if one.salt == adapter.identity]:
            self._emit(sequence, SequenceUpdate(error=error))

    def step(self) -> bool:
        """One forward pass, and what follows from it. False when there is nothing to compute until an adapter arrives."""
        started = time.perf_counter()
        launched, self._following = self._following, None
        if launched is None:
            plan = self.scheduler.plan()
            if not plan.chunks:
                return not self.scheduler.blocked
            launched = self._launch(plan)
        if self._ahead:
            self._following = self._launch_ahead(launched)
        answers = self._read(launched)
        with woken_together():
            for chunk in launched.plan.chunks:
                if chunk.sequence.finished:  # it left when the step was launched already
                    continue
                answer = answers.get(chunk.sequence.id, Answer())
                try:
                    update = answer if isinstance(answer, SequenceUpdate) else self._accept(chunk, answer)
                except Exception as error:  # a tokenizer that cannot read its own tokens, say
                    update = _broken(error)
                if update is not None:
                    self._emit(chunk.sequence, update)
        if self._following is not None and all(chunk.sequence.finished for chunk in self._following.plan.chunks):
            self._following = None
        self.last_step = self._stats(launched, time.perf_counter() - started)
        self.totals = self.totals.after(self.last_step)
        return True

    def _launch(self, plan: StepPlan) -> _Launched:
        """Start computing a plan."""
        ended, self._ended = self._ended, []
        now = time.monotonic()
        for chunk in plan.chunks:
            if chunk.sequence.started is None:
                chunk.sequence.started = now
        try:
            return _Launched(plan, self._runner.launch(step_input(plan, ended)))
        except Exception as error:
            self._ended = ended  # the launch may not have come so far
            return _Launched(plan, error)

    def _launch_ahead(self, current: _Launched) -> _Launched | None:
        """The step after one in progress, where it can be planned and launched without its result."""
        plan = self.scheduler.plan_ahead(current.plan) if not isinstance(current.pending, Exception) else None
        if plan is None:
            return None
        following = self._launch(plan)
        if isinstance(following.pending, Exception):  # planned again, and tried in pieces, once the result is known
            self.scheduler.forgo(plan)
            return None
        return following

    def _read(self, launched: _Launched) -> dict[int, Answer | SequenceUpdate]:
        """Answers of a step. When it fails, each chunk is tried alone: only those that fail alone end with an error."""
        plan, pending = launched.plan, launched.pending
        if not isinstance(pending, Exception):
            try:
                answers: dict[int, Answer | SequenceUpdate] = dict(pending.result())
                if pending.revised:  # what was launched ahead read tokens that are void
                    self._following = None
                return answers
            except Exception as error:
                pending = error
        self._following = None
        if len(plan.chunks) == 1:
            return {plan.chunks[0].sequence.id: _broken(pending)}
        _log.warning("a step over %d sequences failed (%r); each is tried alone", len(plan.chunks), pending)
        retried: dict[int, Answer | SequenceUpdate] = {}
        zeros = plan.zeros
        for chunk in plan.chunks:
            if chunk.sequence.finished:
                continue
            copies = tuple((old, new) for old, new in plan.copies if new in chunk.sequence.pages)
            # The token that it awaited is known by now.
            alone = StepPlan((replace(chunk, awaits=False),), copies, zeros)
            retried |= self._read(self._launch(alone))
            # Once: a page zeroed again would lose what an earlier chunk of this retry wrote.
            zeros = ()
        return retried

    def _accept(self, chunk: Chunk, answer: Answer) -> SequenceUpdate | None:
        """Take an answer into the sequence; the update for its sink, None when there is nothing to report yet."""
        sequence = chunk.sequence
        sequence.prompt_scores += answer.prompt_scores
        if not answer.sampled:
            if answer.values is not None and not np.isfinite(answer.values).all():
                return SequenceUpdate(
                    error=StepError(
                        "the model gave NaN or infinite values",
                        results=[],
                        hint="load with dtype='float32', in which fewer numbers overflow",
                        http_hint=_HTTP_FLOAT32,
                    )
                )
            self.scheduler.advance(chunk)
            return SequenceUpdate(answer=answer.values) if answer.values is not None else None
        update = self._take(sequence, answer.sampled)
        if update.error is not None:
            return update
        # The last token is the model's own; those before it are accepted drafts.
        accepted = max(len(update.token_ids) - 1, 0)
        sequence.accepted_drafts += accepted
        self.scheduler.advance(chunk, accepted)
        if isinstance(sequence.drafter, Proposals):
            sequence.drafter.propose(answer.drafts)
        if sequence.forks:
            self.scheduler.fork(sequence)
        return update

    def _take(self, sequence: Sequence, sampled: tuple[SampledToken, ...]) -> SequenceUpdate:
        """New tokens, one after the other, until one ends the completion."""
        tokens: list[int] = []
        text, reason = "", None
        for one in sampled:
            if one.token_id is None:
                return SequenceUpdate(
                    error=StepError(
                        one.fault,
                        results=[],
                        hint="load with dtype='float32', or ban fewer tokens",
                        http_hint=f"ban fewer tokens; {_HTTP_FLOAT32}",
                    )
                )
            tokens.append(one.token_id)
            piece, reason = self._next(sequence, one.token_id)
            text += piece
            if reason is not None:
                break
        scores = tuple(one.logprobs for one in sampled[: len(tokens)] if one.logprobs is not None)
        return SequenceUpdate(token_ids=tuple(tokens), logprobs=scores, text=text, finish_reason=reason)

    def _next(self, sequence: Sequence, token: int) -> tuple[str, FinishReason | None]:
        """One new token: the text that can be shown now, and whether it ends the completion."""
        rule = sequence.stop
        assert rule is not None
        sequence.append(token)
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
        if met is not None:
            sequence.stop_string = met
            return text, FinishReason.STOP
        return text + stop_text.flush() if reason is not None else text, reason

    def _emit(self, sequence: Sequence, update: SequenceUpdate) -> None:
        if update.last:
            failed = update.error is not None
            if failed:
                self.scheduler.invalidate(sequence)
            self.totals = replace(
                self.totals, finished=self.totals.finished + (not failed), failed=self.totals.failed + failed
            )
            self._leave(sequence)
        try:
            sequence.sink(update)
        except Exception:
            _log.exception("a caller could not take its answer; its request is dropped")
            self.abort(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self._texts.pop(sequence, None)
        if sequence.started is not None:  # the runner knows no other
            self._ended.append(sequence.id)
        self.scheduler.remove(sequence)
        forks = [fork for fork in sequence.forks if not fork.finished]
        sequence.forks = []
        if forks:  # the prompt was not computed for them: the first of them computes it
            forks[0].forks = forks[1:]
            self.scheduler.add(forks[0])

    def _stats(self, launched: _Launched, seconds: float) -> StepStats:
        plan, pending = launched.plan, launched.pending
        decoding = [chunk for chunk in plan.chunks if chunk.start >= len(chunk.sequence.prompt)]
        drafted = sum(chunk.drafted for chunk in plan.chunks)
        return StepStats(
            prompt_tokens=plan.tokens - len(decoding) - drafted,
            decode_tokens=len(decoding),
            draft_tokens=drafted,
            rows=len(plan.chunks),
            seconds=seconds,
            graph="the step failed" if isinstance(pending, Exception) else pending.graph,
            **self._load(),
        )

    def _load(self) -> dict[str, Any]:
        allocator = self.scheduler.allocator
        return {
            "running": len(self.scheduler) - self.scheduler.waiting,
            "waiting": self.scheduler.waiting,
            "pages_used": allocator.capacity - allocator.available if allocator is not None else 0,
            "pages": allocator.capacity if allocator is not None else 0,
        }


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step, and what came of launching it."""

    plan: StepPlan
    pending: PendingStep | Exception


def _broken(error: Exception) -> SequenceUpdate:
    if isinstance(error, LoraxError):
        return SequenceUpdate(error=error)
    wrapped = StepError(
        f"the step failed: {type(error).__name__}: {error}",
        results=[],
        hint="ask again; if it fails again, report it with the traceback of its cause",
    )
    wrapped.__cause__ = error
    return SequenceUpdate(error=wrapped)
