"""Between HTTP and the engine.

Decides who is admitted, how long an answer may take, and that nobody computes for a client who has hung up. Every route asks
the engine through here. Knows nothing of any API's shapes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Final, ParamSpec, Self, TypeVar

from starlette.requests import Request as HttpRequest

from lorax_core.errors import LoraxError
from lorax_core.server.errors import Refused, failure
from lorax_core.server.logs import log_failure
from lorax_core.server.metrics import Metrics, adapter_name, completion_tokens
from lorax_core.server.names import ModelNames
from lorax_core.server.options import ServerOptions
from lorax_core.server.tracing import note
from lorax_core.serving.call import Call
from lorax_core.serving.engine import Engine
from lorax_core.serving.prepare import Result
from lorax_core.serving.requests import GenerateRequest, Request
from lorax_core.serving.stream import Stream
from lorax_core.types import Event

P = ParamSpec("P")
T = TypeVar("T")

INLINE_CHARACTERS: Final = 2_000
"""A shorter text is tokenized in the event loop, where that takes less time than handing it to a thread."""
_THREADS: Final = 8
_TIMEOUT_HEADER: Final = "x-request-timeout"
_SECONDS: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?")  # Python also reads 1_0 and other digits


class ClientGone(Exception):
    """The client hung up: nobody reads an answer."""


class Gateway:
    """One engine, as the routes of one server use it. Its methods belong to the server's event loop."""

    def __init__(self, engine: Engine, options: ServerOptions, metrics: Metrics, names: ModelNames) -> None:
        self.engine, self.options, self.metrics = engine, options, metrics
        self.names = names
        self.draining = False
        self._in_flight = 0
        self._rows = engine.options.max_batch_rows
        # Apart: adapters that take minutes to load must not delay prompts.
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="lorax-http")
        self._jobs = ThreadPoolExecutor(_THREADS, thread_name_prefix="lorax-jobs")
        self._ended: deque[tuple[float, int]] = deque(maxlen=32)
        self._calls: weakref.WeakSet[Call] = weakref.WeakSet()
        self._cut = False  # what ran was ended, as there was no more time for it

    async def answer(self, http: HttpRequest, requests: Sequence[Request]) -> list[Result]:
        """Results in the order of the requests. The call is cancelled when the client hangs up, or when it takes too long.

        Raises LoraxError (Refused, StepError and all others) and ClientGone.
        """
        return (await self.timed(http, requests))[0]

    async def timed(self, http: HttpRequest, requests: Sequence[Request]) -> tuple[list[Result], float]:
        """The same, and the seconds that passed before their first step."""
        with self._admit(http, requests) as ticket:
            call: Call | None = None
            try:
                call = await self._submit(http, requests, ticket)
                results = await self._unless_gone(http, ticket, _all_of(call))
            except LoraxError as error:
                raise self._explained(error) from error
            finally:
                if call is not None:
                    call.cancel()
            for result in results:
                ticket.observe(call, result)
            self._account(ticket, call, list(zip(requests, results, strict=True)))
            return results, 0.0 if call.started is None else call.started - ticket.start

    async def events(self, http: HttpRequest, requests: Sequence[GenerateRequest]) -> Events:
        """The answers as they come. What is wrong with the requests is raised now, before anything was sent."""
        ticket = self._admit(http, requests)
        try:
            return Events(self, requests, await self._submit(http, requests, ticket), ticket)
        except LoraxError as error:
            ticket.close()
            raise self._explained(error) from error
        except BaseException:
            ticket.close()
            raise

    async def in_thread(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What takes long or blocks, such as loading an adapter, beside the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._jobs, functools.partial(job, *args, **kwargs))

    def check_batch(self, count: int, *, param: str) -> None:
        """Raises Refused for more inputs than one request may have."""
        if count > self.options.max_batch:
            raise Refused(
                "too_large",
                f"{count} inputs; one request may have {self.options.max_batch}",
                hint="send them in several requests",
                param=param,
            )

    def drain(self) -> None:
        """Take nothing new, and end what still runs after `drain_timeout`: its clients get an error and no broken answer."""
        self.draining = True
        asyncio.get_running_loop().call_later(self.options.drain_timeout, self._end)

    def _end(self) -> None:
        self._cut = True
        for call in list(self._calls):
            call.cancel()

    def close(self) -> None:
        """Let the threads go. The engine stays."""
        for pool in (self._pool, self._jobs):
            pool.shutdown(wait=False, cancel_futures=True)

    def _admit(self, http: HttpRequest, requests: Sequence[Request]) -> Ticket:
        if self.draining:
            raise Refused("unavailable", "the server is shutting down", hint="ask another one", retry_after=1)
        if self.engine.closed:
            raise _closed()
        count = sum(request.n if isinstance(request, GenerateRequest) else 1 for request in requests)
        room = self._rows + self.options.max_queue
        # A request that is larger than the queue is let in alone: it would otherwise never be.
        if self._in_flight and self._in_flight + count > room:
            raise Refused(
                "overloaded",
                f"{self._in_flight} sequences are computed or wait, and {room} may",
                hint="try again later, or start the server with a larger --max-queue",
                retry_after=self._retry_after(),
            )
        return Ticket(self, count, self._deadline(http))

    def _deadline(self, http: HttpRequest) -> float:
        given = http.headers.get(_TIMEOUT_HEADER)
        seconds = self.options.request_timeout
        if given is not None:
            asked = float(given) if _SECONDS.fullmatch(given) else -1.0
            if not 0 < asked <= 86_400:
                raise Refused(
                    "invalid",
                    f"{_TIMEOUT_HEADER} is a number of seconds, not {given!r:.40}",
                    hint=f"at most {seconds:g} are given here",
                    param=_TIMEOUT_HEADER,
                )
            seconds = min(seconds, asked)
        return asyncio.get_running_loop().time() + seconds

    def _retry_after(self) -> int:
        """Seconds until about half of what is here now is answered, by the rate of the last ones."""
        if len(self._ended) < 2:
            return 1
        (start, _), (end, _) = self._ended[0], self._ended[-1]
        rate = sum(count for _, count in self._ended) / max(end - start, 0.1)
        return int(min(max(self._in_flight / 2 / max(rate, 0.01), 1), 60))

    async def _submit(self, http: HttpRequest, requests: Sequence[Request], ticket: Ticket) -> Call:
        call = await self._submitted(http, requests, ticket)
        self._calls.add(call)
        return call

    async def _submitted(self, http: HttpRequest, requests: Sequence[Request], ticket: Ticket) -> Call:
        if sum(map(_size, requests)) <= INLINE_CHARACTERS:
            return self.engine.submit(requests)
        submitted = self._pool.submit(self.engine.submit, requests)
        try:
            return await self._unless_gone(http, ticket, asyncio.wrap_future(submitted))
        except BaseException:
            # It may become a call after all, which nobody would wait for.
            submitted.add_done_callback(_cancel)
            raise

    async def _unless_gone(self, http: HttpRequest, ticket: Ticket, work: Awaitable[T]) -> T:
        """The result of `work`, which is cancelled when the client hangs up or the time is over."""
        working = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(until_gone(http.receive))
        try:
            async with asyncio.timeout_at(ticket.deadline):
                await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError as error:
            raise _late(self.options) from error
        finally:
            gone.cancel()
            working.cancel()
        if working.done() and not working.cancelled():
            return working.result()
        self.metrics.hung_up()
        raise ClientGone

    def _explained(self, error: LoraxError) -> LoraxError:
        """An error of the engine as clients should take it: one that has closed may be another server's to answer for."""
        if self._cut and not isinstance(error, Refused):
            return Refused("unavailable", "the server shut down before the answer was whole", hint="ask another one")
        return _closed() if self.engine.closed and not isinstance(error, Refused) else error

    def _account(self, ticket: Ticket, call: Call, answered: Sequence[tuple[Request, Result]]) -> None:
        """Count what a call came to, and note it in the trace."""
        for request, result in answered:
            self.metrics.result(_task(request), request.adapter, result)
        waited = None if call.started is None else call.started - ticket.start
        if waited is not None:
            self.metrics.queued.observe(waited)
        first = call.first_update
        adapters = {adapter_name(request.adapter) for request, _ in answered if request.adapter is not None}
        note(
            lorax__task=",".join(sorted({_task(request) for request, _ in answered})),
            lorax__adapter=",".join(sorted(adapters))[:1_000] or None,
            gen_ai__request__model=self.names.base,
            gen_ai__usage__input_tokens=sum(result.usage.prompt_tokens for _, result in answered),
            gen_ai__usage__output_tokens=sum(map(completion_tokens, (result for _, result in answered))),
            gen_ai__latency__time_in_queue=waited,
            gen_ai__latency__time_to_first_token=None if first is None else first - ticket.start,
        )

    def _enter(self, count: int) -> None:
        if not self._in_flight:
            self._ended.clear()  # how fast answers came before a pause says nothing of now
        self._in_flight += count
        self.metrics.in_flight.set(self._in_flight)

    def _leave(self, count: int) -> None:
        self._in_flight -= count
        self.metrics.in_flight.set(self._in_flight)
        self._ended.append((time.monotonic(), count))


class Ticket:
    """The place of one call among those that a server admits, until it is closed or dropped."""

    def __init__(self, gateway: Gateway, count: int, deadline: float) -> None:
        self.deadline = deadline
        self._gateway, self._count = gateway, count
        self.start = time.monotonic()
        gateway._enter(count)

    def observe(self, call: Call, result: Any) -> None:
        """Note how fast a completion came."""
        first = call.first_update
        if first is not None and hasattr(result, "token_ids"):
            now = time.monotonic()
            self._gateway.metrics.times(first - self.start, now - self.start, len(result.token_ids))

    def close(self) -> None:
        """Give the place back. Idempotent."""
        if self._count:
            count, self._count = self._count, 0
            self._gateway._leave(count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Events:
    """Events of one call, for one client: `async for`. Closing or dropping it cancels what has not finished."""

    def __init__(self, gateway: Gateway, requests: Sequence[GenerateRequest], call: Call, ticket: Ticket) -> None:
        self.deadline = ticket.deadline
        self._gateway, self._requests, self._call, self._ticket = gateway, requests, call, ticket
        self._stream = Stream(call)
        self._expired = False
        # Not a timeout around the loop below: it would cancel the task while that waits for its client. Weak: what nobody
        # holds is cancelled at once.
        self._timer = asyncio.get_running_loop().call_at(self.deadline, _expire, weakref.ref(self))

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            async for event in self._stream:
                if event.completion is not None:
                    self._ticket.observe(self._call, event.completion)
                yield event
            pairs = zip(self._requests, self._call.results, strict=True)
            answered = [(one, got) for one, got in pairs if got is not None and not isinstance(got, LoraxError)]
            self._gateway._account(self._ticket, self._call, answered)
        except LoraxError as error:
            raise (_late(self._gateway.options) if self._expired else self._gateway._explained(error)) from error
        finally:
            self.close()

    def failed(self, error: BaseException) -> None:
        """Note that the answer broke off with an error."""
        found = failure(error)
        self._gateway.metrics.refused(found.kind)
        log_failure(found, error)

    def hung_up(self) -> None:
        """Note that nobody reads any more."""
        self._gateway.metrics.hung_up()

    def close(self) -> None:
        """Cancel what has not finished, and give the place back. Idempotent."""
        self._timer.cancel()
        self._stream.close()
        self._ticket.close()

    def expire(self) -> None:
        """Cancel what has not finished, because the time is over."""
        self._expired = True
        self._call.cancel()


def _expire(events: weakref.ref[Events]) -> None:
    found = events()
    if found is not None:
        found.expire()


async def until_gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Ends when the client hangs up; `receive` is that of a request whose body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _all_of(call: Call) -> list[Result]:
    return await call


def _closed() -> Refused:
    return Refused("unavailable", "the engine has closed", hint="ask another server; this one must be started again")


def _cancel(submitted: Future[Call]) -> None:
    with contextlib.suppress(Exception):
        submitted.result().cancel()


def _late(options: ServerOptions) -> Refused:
    return Refused(
        "deadline",
        "the answer took longer than this request may take",
        hint=f"ask for fewer tokens; the server's limit is {options.request_timeout:g} seconds (--request-timeout)",
    )


def _task(request: Request) -> str:
    return type(request).__name__.removesuffix("Request").lower()


def _size(request: Request) -> int:
    """About how much work it is to make a sequence of a request, in characters of text."""
    if isinstance(request, GenerateRequest):
        constrained = request.json_schema is not None or request.regex is not None or request.choice is not None
        if constrained or not isinstance(request.prompt, str):
            return INLINE_CHARACTERS + 1
        return len(request.prompt) + 50
    texts = [value for value in vars(request).values() if isinstance(value, (str, tuple, list))]
    return 50 + sum(len(text) if isinstance(text, str) else sum(map(len, map(str, text))) for text in texts)
