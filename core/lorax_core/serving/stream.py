"""From an engine's updates to a caller's results, one by one or all together.

Decides how callers wait. Dropping or closing a stream cancels what it has not finished. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Self

from lorax_core.engine.sequence import Sequence, SequenceUpdate
from lorax_core.errors import LoraxError, StepError
from lorax_core.serving.prepare import Prepared, Result
from lorax_core.types import Completion, Event, FinishReason, TokenLogprobs, Usage


class Mailbox:
    """Updates on their way from the engine's thread to a caller's, who waits in a thread or in an event loop."""

    def __init__(self) -> None:
        self._items: deque[tuple[int, SequenceUpdate]] = deque()
        self._changed = threading.Condition()
        self._wake: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def put(self, index: int, update: SequenceUpdate) -> None:
        with self._changed:
            self._items.append((index, update))
            self._changed.notify_all()
            waiter, self._wake = self._wake, None
        if waiter is not None and not waiter[0].is_closed():
            waiter[0].call_soon_threadsafe(waiter[1].set)

    def get(self) -> tuple[int, SequenceUpdate]:
        with self._changed:
            while not self._items:
                self._changed.wait()
            return self._items.popleft()

    async def aget(self) -> tuple[int, SequenceUpdate]:
        while True:
            with self._changed:
                if self._items:
                    return self._items.popleft()
                event = asyncio.Event()
                self._wake = (asyncio.get_running_loop(), event)
            await event.wait()


@dataclass(slots=True)
class _Answer:
    """One answer to one request on its way: which it is, and what has come of it so far."""

    index: int
    choice: int
    sequence: Sequence
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    completion: Completion | None = None


class Call:
    """Requests that were made together: their sequences and what has come of them so far."""

    def __init__(self, prepared: SequenceOf[Prepared]) -> None:
        self._prepared = list(prepared)
        self._answers = [
            _Answer(index, choice, sequence)
            for index, one in enumerate(self._prepared)
            for choice, sequence in enumerate((one.sequence, *one.sequence.forks))
        ]
        self._choices: list[list[_Answer]] = [[] for _ in self._prepared]
        for answer in self._answers:
            self._choices[answer.index].append(answer)
        self._open = len(self._answers)
        self.results: list[Result | LoraxError | None] = [None] * len(self._prepared)
        self.mailbox = Mailbox()
        for place, answer in enumerate(self._answers):
            answer.sequence.sink = partial(self.mailbox.put, place)

    @property
    def sequences(self) -> list[Sequence]:
        """What the engine is given: the first answer of each request, which brings the others along."""
        return [one.sequence for one in self._prepared]

    @property
    def unfinished(self) -> list[Sequence]:
        """Answers that may still be running."""
        return [answer.sequence for answer in self._answers if not answer.sequence.finished]

    @property
    def done(self) -> bool:
        return self._open == 0

    def take(self, place: int, update: SequenceUpdate) -> Event | None:
        """Account for an update; the event that it makes for a stream, None when there is nothing to show."""
        answer = self._answers[place]
        self._open -= update.last
        if update.error is not None:
            self.results[answer.index] = update.error
            return None
        answer.text.append(update.text)
        answer.logprobs += update.logprobs
        if update.answer is not None:
            self.results[answer.index] = self._prepared[answer.index].result(update.answer)
        if update.finish_reason is not None:
            answer.completion = _completion(answer, update.finish_reason)
            self._settle(answer.index)
        tokens = list(update.token_ids)
        return Event(answer.index, update.text, tokens, update.finish_reason, answer.completion, answer.choice)

    def _settle(self, index: int) -> None:
        """The result of a request, once all of its answers are there."""
        completions = [answer.completion for answer in self._choices[index]]
        whole = [completion for completion in completions if completion is not None]
        if len(whole) == len(completions) and self.results[index] is None:
            self.results[index] = replace(whole[0], alternatives=whole[1:])

    def wait(self) -> list[Result]:
        """Every result, in order. A single failure raises its own error; failures among several raise StepError."""
        while not self.done:
            self.take(*self.mailbox.get())
        return self.outcome()

    def outcome(self) -> list[Result]:
        """The results, once done; raises as `wait` does."""
        results: list[Result] = []
        failed: list[LoraxError] = []
        for result in self.results:
            if isinstance(result, LoraxError):
                failed.append(result)
            elif result is not None:
                results.append(result)
        if failed and len(self.results) == 1:
            raise failed[0]
        if failed:
            raise StepError(
                f"{len(failed)} of {len(self.results)} requests failed; the first: {failed[0].message}",
                results=list(self.results),
                hint="the error's .results has every request's result or error, in order",
            ) from failed[0]
        return results


def _completion(answer: _Answer, reason: FinishReason) -> Completion:
    sequence = answer.sequence
    usage = Usage(len(sequence.prompt), len(sequence.output), sequence.reused, sequence.accepted_drafts)
    return Completion(
        text="".join(answer.text),
        token_ids=list(sequence.output),
        finish_reason=reason,
        usage=usage,
        logprobs=answer.logprobs if sequence.sampling.logprobs is not None else None,
        prompt_logprobs=[None, *sequence.prompt_scores] if sequence.prompt_logprobs is not None else None,
    )


class Stream:
    """Events of a call as they happen: iterate with `for` or `async for`; `close()`, or dropping it, cancels the rest."""

    def __init__(self, call: Call, abort: Callable[[list[Sequence]], None]) -> None:
        self._call = call
        self._abort = abort
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        while not self._over():
            event = self._call.take(*self._call.mailbox.get())
            if event is not None:
                return event
        raise StopIteration

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._over():
            event = self._call.take(*await self._call.mailbox.aget())
            if event is not None:
                return event
        raise StopAsyncIteration

    def close(self) -> None:
        """Cancel what has not finished; its pages are free before the engine's next step. Idempotent."""
        if not self._closed:
            self._closed = True
            if unfinished := self._call.unfinished:
                self._abort(unfinished)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _over(self) -> bool:
        """Whether no event will come; raises what went wrong, once all else has been given."""
        if self._closed:
            return True
        if not self._call.done:
            return False
        self._closed = True
        self._call.outcome()
        return True
