"""The step loop of one engine.

Decides what a step means for each sequence: plan, run, accept, emit. Single-threaded; `worker` gives it a thread.
"""

from __future__ import annotations

import logging

from lorax_core.engine.detokenizer import Detokenizer, TextDecoder
from lorax_core.engine.runner import Answer, Runner
from lorax_core.engine.scheduler import Scheduler, StepPlan
from lorax_core.engine.sequence import Sequence, Update
from lorax_core.engine.stopping import StopText
from lorax_core.errors import LoraxError, StepError
from lorax_core.types import FinishReason

_log = logging.getLogger(__name__)


class EngineLoop:
    """Living sequences and the steps that move them on.

    Sequences learn of their progress through their `sink`. With no `decoder` completions have token ids and no text.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, decoder: TextDecoder | None = None) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._decoder = decoder
        self._texts: dict[Sequence, tuple[Detokenizer, StopText]] = {}

    @property
    def busy(self) -> bool:
        """Whether any sequence is alive."""
        return len(self.scheduler) > 0

    def add(self, sequence: Sequence) -> None:
        """A sequence joins; it takes part from the next step on."""
        if self._decoder is not None and sequence.stop is not None:
            self._texts[sequence] = (Detokenizer(self._decoder), StopText(sequence.stop.strings))
        self.scheduler.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """A sequence leaves without an answer; its pages are free before the next step. No-op once it has finished."""
        if not sequence.finished:
            self._leave(sequence)

    def step(self) -> None:
        """One forward pass, and what follows from it."""
        plan = self.scheduler.plan()
        if not plan.chunks:
            return
        try:
            answers = self._runner.run(plan)
        except Exception as error:
            self._fail(plan, error)
            return
        self.scheduler.advance(plan)
        for sequence, answer in answers.items():
            self._emit(sequence, self._accept(sequence, answer))

    def _accept(self, sequence: Sequence, answer: Answer) -> Update:
        """Take an answer into the sequence and say what is new."""
        if answer.token_id is None:
            return Update(answer=answer.values)
        rule = sequence.stop
        assert rule is not None
        sequence.output.append(answer.token_id)
        reason = None
        if answer.token_id in rule.token_ids:
            reason = FinishReason.STOP
        elif len(sequence.output) >= rule.max_tokens:
            reason = FinishReason.LENGTH
        text = ""
        if sequence in self._texts:
            detokenizer, stop_text = self._texts[sequence]
            # A stop token that is not special has text of its own, which is no part of the answer.
            piece = "" if reason is FinishReason.STOP else detokenizer.push(answer.token_id)
            if reason is not None:
                piece += detokenizer.flush()
            text, met = stop_text.feed(piece)
            if met:
                reason = FinishReason.STOP
            elif reason is not None:
                text += stop_text.flush()
        return Update(token_ids=(answer.token_id,), text=text, finish_reason=reason)

    def _emit(self, sequence: Sequence, update: Update) -> None:
        if update.last:
            self._leave(sequence)
        sequence.sink(update)

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        """End the sequences of a step that broke; the others and the cache stay sound."""
        _log.exception("a step over %d sequences failed", len(plan.chunks))
        for chunk in plan.chunks:
            told = error if isinstance(error, LoraxError) else StepError(f"the step failed: {error!r}", results=[])
            if told is not error:
                told.__cause__ = error
            self._emit(chunk.sequence, Update(error=told))

    def _leave(self, sequence: Sequence) -> None:
        sequence.finished = True
        self._texts.pop(sequence, None)
        self.scheduler.remove(sequence)
