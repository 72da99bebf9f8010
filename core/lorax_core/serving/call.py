"""Requests that were made together, and their state.

Decides how callers wait: in a thread, in an event loop, or event by event. A call may exist before its sequences do, while an
adapter is being fetched. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Generator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lorax_core.engine.process import OwnProcess
from lorax_core.engine.sequence import Sequence, SequenceUpdate, discard
from lorax_core.engine.wakes import wake
from lorax_core.errors import LoraxError, RequestError, StepError, shown
from lorax_core.serving.prepare import Prepared, Result
from lorax_core.types import Completion, Event, FinishReason, TokenLogprobs, Usage

Sequences = list[Sequence]


@dataclass(slots=True)
class _Answer:
    """One answer to one request: its index, and the output so far."""

    index: int
    choice: int
    sequence: Sequence
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    completion: Completion | None = None


@dataclass(slots=True)
class _News:
    """What came of one answer since a caller last took some. Lists: objects that live long cost the collector of garbage."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    end: SequenceUpdate | None = None

    def add(self, update: SequenceUpdate) -> None:
        """One update more."""
        self.token_ids += update.token_ids
        if update.text:
            self.text.append(update.text)
        if update.logprobs:
            self.logprobs += update.logprobs
        if update.last:
            self.end = update


class Call:
    """`count` requests that were submitted together. Made by `Engine.submit`; safe to use from any thread.

    Wait for the results with `wait()` or `await call`. Cancelling the task that awaits it, or `cancel()`, takes its sequences
    out of the engine before the next step. Dropping a call does not: its results may be unused, but the work goes on.
    """

    def __init__(self, count: int, abort: Callable[[Sequences], None]) -> None:
        self.results: list[Result | LoraxError | None] = [None] * count
        self._abort = abort
        self._prepared: list[Prepared] = []
        self._answers: list[_Answer] = []
        self._choices: list[list[_Answer]] = [[] for _ in range(count)]
        self._open: int | None = None  # answers that are not complete; None before the call starts
        # By place in `_answers`, the longest waiting first: put by the engine's thread, taken by the callers' threads.
        self._news: dict[int, _News] = {}
        self._coming = 0  # answers whose last update has not been put
        self._watched = False  # whether somebody waits for any update, and not for the end alone
        self._wakers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        # Guards all of these. Lock order: `_taking` before `_changed`, never the reverse.
        self._changed = threading.Condition()
        # Reentrant: `cancel` and `done` take all updates while they hold it.
        self._taking = threading.RLock()  # one thread at a time turns updates into results
        self._cancelled = False
        self._process = OwnProcess()
        self.first_update: float | None = None
        """When the first of its answers got something, by `time.monotonic`."""

    # --- from the engine ---

    def start(self, prepared: SequenceOf[Prepared], submit: Callable[[Sequences], None]) -> None:
        """Submit the sequences of all requests together; no-op for a call that was cancelled before."""
        with self._changed:
            if self._cancelled:
                return
            self._prepared = list(prepared)
            for index, one in enumerate(self._prepared):
                # Forks are submitted with their first sequence, not beside it: they start once its prompt is computed.
                for choice, sequence in enumerate((one.sequence, *one.sequence.forks)):
                    answer = _Answer(index, choice, sequence)
                    sequence.sink = partial(self._put, len(self._answers))
                    self._answers.append(answer)
                    self._choices[index].append(answer)
            self._coming = len(self._answers)
            # Under the lock, so that a cancellation comes before or after, and finds the sequences then.
            submit([one.sequence for one in self._prepared])
            # After the submission: when that raises, the call has not started and `fail` may end it.
            self._open = len(self._answers)
            self._wake()

    def fail(self, error: LoraxError) -> None:
        """End a call that has not started: every request has this error. No-op for one that was cancelled."""
        with self._changed:
            if self._cancelled:
                return
            self.results = [error] * len(self.results)
            self._open = 0
            self._wake()

    def _put(self, place: int, update: SequenceUpdate) -> None:
        with self._changed:
            if self._open == 0:  # a step may be in progress while its call is cancelled
                return
            if self.first_update is None:
                self.first_update = time.monotonic()
            news = self._news.get(place)
            if news is None:
                news = self._news[place] = _News()
            news.add(update)
            self._coming -= update.last
            # Who waits for the end is not woken by each token: that would take the interpreter from the engine's thread.
            if self._watched or not self._coming:
                self._wake()

    def _wake(self) -> None:
        """Wake all waiters. The caller holds `_changed`."""
        self._changed.notify_all()
        self._watched = False  # those who wait on say so again
        wakers, self._wakers = self._wakers, []
        for loop, event in wakers:
            wake(loop, event)

    # --- for callers ---

    @property
    def here(self) -> bool:
        """Whether this is the process that made the call, and no forked child of it."""
        return self._process.here

    @property
    def started(self) -> float | None:
        """When the first step of any of its sequences began, by `time.monotonic`; None before."""
        return min((at for answer in self._answers if (at := answer.sequence.started) is not None), default=None)

    @property
    def done(self) -> bool:
        """Whether every request has its result or error."""
        self._process.check()
        with self._taking:
            self._take_all()
            return self._open == 0

    def wait(self, timeout: float | None = None) -> list[Result]:
        """Every result, in order.

        A single failure raises its own error; failures among several raise StepError, whose `results` has both. After
        `timeout` seconds raises TimeoutError, and the call goes on. An interruption (KeyboardInterrupt) cancels it.
        """
        deadline = _deadline(timeout)
        try:
            while not self.done:
                self._wait_for_update(deadline, each=False)
        # The only end that leaves the call running; all others, KeyboardInterrupt included, cancel it.
        except TimeoutError:
            raise
        except BaseException:
            self.cancel()
            raise
        return self._outcome()

    def __await__(self) -> Generator[Any, None, list[Result]]:
        return self._result().__await__()

    def cancel(self) -> None:
        """Take out what has not finished; pages are free before the engine's next step. Idempotent, no-op once it is done."""
        self._process.check()
        with self._taking:
            self._take_all()
            with self._changed:
                if self._open == 0:
                    return
                self._cancelled, self._open = True, 0
                unfinished = [answer.sequence for answer in self._answers if not answer.sequence.finished]
                error = LoraxError("the call was cancelled", hint="submit the requests again")
                self.results = [error if result is None else result for result in self.results]
                self._news.clear()
                # A step in progress may still give these an update, which must not reach the call.
                for sequence in unfinished:
                    sequence.sink = discard
                self._wake()
        # Outside both locks: the engine's thread takes its own, and calls `_put` under `_changed`.
        if unfinished:
            self._abort(unfinished)

    def next_event(self) -> Event | None:
        """The next event of any answer, None once there will be none; raises as `wait` does when all others were given."""
        while True:
            event, over = self._next()
            if event is not None or over:
                return event
            self._wait_for_update(None, each=True)

    async def next_event_async(self) -> Event | None:
        """`next_event` for an event loop."""
        while True:
            event, over = self._next()
            if event is not None or over:
                return event
            await self._update_async(each=True)

    async def _result(self) -> list[Result]:
        try:
            while not self.done:
                await self._update_async(each=False)
        except BaseException:  # the task was cancelled
            self.cancel()
            raise
        return self._outcome()

    def _nothing_to_take(self, *, each: bool) -> bool:
        """Whether to wait: for any update with `each`, else for the last. The caller holds `_changed`."""
        self._watched = self._watched or each
        return self._open != 0 and not (self._news and (each or not self._coming))

    def _wait_for_update(self, deadline: float | None, *, each: bool) -> None:
        with self._changed:
            while self._nothing_to_take(each=each):
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError("the call is still running; wait() again, or cancel() it")
                self._changed.wait(left)

    async def _update_async(self, *, each: bool) -> None:
        with self._changed:
            if not self._nothing_to_take(each=each):
                return
            # Made under `_changed`: an update cannot come between the check above and the registration.
            event = asyncio.Event()
            self._wakers.append((asyncio.get_running_loop(), event))
        await event.wait()

    # --- from updates to results ---

    def _next(self) -> tuple[Event | None, bool]:
        """An event that has already arrived (if any), and whether the stream has ended."""
        self._process.check()
        with self._taking:
            while (found := self._pop()) is not None:
                if self._take(*found):
                    return _event(*found), False
            over = self._open == 0
        if over:
            self._outcome()
        return None, over

    def _take_all(self) -> None:
        while (found := self._pop()) is not None:
            self._take(*found)

    def _pop(self) -> tuple[_Answer, _News] | None:
        with self._changed:
            place = next(iter(self._news), None)
            return None if place is None else (self._answers[place], self._news.pop(place))

    def _take(self, answer: _Answer, news: _News) -> bool:
        """Account for what came; whether a stream shows it."""
        shown = bool(news.token_ids) or (news.end is not None and news.end.error is None)
        try:
            self._account(answer, news)
        except Exception as error:  # a tokenizer that cannot read its own tokens, say
            failure = StepError(
                f"an answer could not be read: {type(error).__name__}: {error}",
                results=[],
                hint="report it with the traceback of its cause; the tokenizer cannot decode its own tokens",
            )
            # `raise ... from` without raising: the error is kept as a result.
            failure.__cause__ = error
            self.results[answer.index], shown = failure, bool(news.token_ids)
        # Also after an error above, or the call would never end.
        if news.end is not None:
            answer.sequence.sink = discard  # the sequence, and with it its adapter, is freed with the call
            self._close_one()
        return shown

    def _account(self, answer: _Answer, news: _News) -> None:
        # Pieces are joined once at the end; adding strings per token would be quadratic.
        answer.text += news.text
        answer.logprobs += news.logprobs
        end = news.end
        if end is None:
            return
        if end.error is not None:
            self.results[answer.index] = end.error
            return
        if end.answer is not None:
            self.results[answer.index] = self._prepared[answer.index].result(end.answer)
        if end.finish_reason is not None:
            answer.completion = _completion(answer, end.finish_reason)
            self._settle(answer.index)

    def _close_one(self) -> None:
        with self._changed:
            if not self._open:  # cancelled meanwhile, by a signal handler of this very thread
                return
            self._open -= 1
            if self._open == 0:
                self._wake()  # others may wait for the same call

    def _settle(self, index: int) -> None:
        """The result of a request, once all of its answers are there."""
        completions = [answer.completion for answer in self._choices[index]]
        whole = [completion for completion in completions if completion is not None]
        # An error of one choice is the result already, and stays.
        if len(whole) == len(completions) and self.results[index] is None:
            self.results[index] = replace(whole[0], alternatives=whole[1:])

    def _outcome(self) -> list[Result]:
        results: list[Result] = []
        failed: list[LoraxError] = []
        for result in self.results:
            if isinstance(result, LoraxError):
                failed.append(result)
            elif result is not None:
                results.append(result)
        # One error object for all requests (`fail`, a stopped engine) is that error, and no StepError around it.
        if failed and (len(self.results) == 1 or all(error is failed[0] for error in self.results)):
            raise failed[0]
        if failed:
            raise StepError(
                f"{len(failed)} of {len(self.results)} requests failed; the first: {failed[0].message}",
                results=list(self.results),
                hint="the error's .results has every request's result or error, in order",
            ) from failed[0]
        return results


def _event(answer: _Answer, news: _News) -> Event:
    reason = news.end.finish_reason if news.end is not None else None
    text = "".join(news.text)
    return Event(answer.index, text, news.token_ids, reason, answer.completion, answer.choice, news.logprobs)


def _deadline(timeout: float | None) -> float | None:
    """When a wait of so many seconds ends, None for never; raises RequestError for what is no number of seconds."""
    if timeout is None:
        return None
    # NaN alone is not itself. Every comparison with it is false, so the wait would never end.
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout != timeout:
        raise RequestError(
            f"timeout: a number of seconds, not {shown(timeout)}", hint="wait() without one has no limit"
        )
    # Longer than threads can wait for, a century is for ever too.
    return None if timeout > threading.TIMEOUT_MAX else time.monotonic() + max(timeout, 0)


def _completion(answer: _Answer, reason: FinishReason) -> Completion:
    sequence = answer.sequence
    usage = Usage(len(sequence.prompt), len(sequence.output), sequence.reused, sequence.accepted_drafts)
    return Completion(
        text="".join(answer.text),
        token_ids=list(sequence.output),
        finish_reason=reason,
        usage=usage,
        logprobs=answer.logprobs if sequence.sampling.logprobs is not None else None,
        # The first token has nothing before it, so no probability, as OpenAI and vLLM give it.
        prompt_logprobs=[None, *sequence.prompt_scores] if sequence.prompt_logprobs is not None else None,
        stop_reason=_stop_reason(sequence, reason),
    )


def _stop_reason(sequence: Sequence, reason: FinishReason) -> int | str | None:
    if reason is not FinishReason.STOP or sequence.stop_string is not None:
        return sequence.stop_string
    last = next(reversed(sequence.output), None)
    return last if sequence.stop is not None and last in sequence.stop.token_ids else None
