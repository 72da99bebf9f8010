"""How fast an engine answers: rates, latencies, and how near that is to what memory allows.

Decides what is measured of an engine and how figures come of it. Knows nothing of the command line.

Requests are random token ids, no two the same, so that no prompt is found in the prefix cache. A generating model is measured
in two ways at each concurrency, each `repeats` times, and the median counts: reading prompts alone, and as streams, whose
events give latencies and the rate of decoding. Other models embed.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, Protocol

import lorax_core
from lorax_core.progress import Progress, Report

if TYPE_CHECKING:
    from lorax_core.serving.engine import Engine

PERCENTILES: Final = (50, 90, 99)
_READ_BYTES: Final = 2**28


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked: requests of `prompt_tokens`, answers of `max_tokens`, the named adapters in turn (none: the base)."""

    prompt_tokens: int
    max_tokens: int
    adapters: tuple[str, ...] = ()
    repeats: int = 3
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured with so many requests at once. Rates are tokens a second of all requests together.

    `first_token_ms` and `further_token_ms` are latencies by percentile. `memory_share` is the time in which memory alone could
    deliver what a decoding step reads (linear layers, keys and values), as a share of the step. `texts_per_second` is of
    models that embed; what a model does not do, or a server does not show, is None.
    """

    concurrency: int
    prompt_tokens_per_second: float
    decode_tokens_per_second: float | None = None
    first_token_ms: dict[str, float] | None = None
    further_token_ms: dict[str, float] | None = None
    memory_share: float | None = None
    texts_per_second: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As `--json` has it."""
        return asdict(self)


def read_rate(device: str) -> float:
    """Bytes a second at which memory is read: the best of several sums over 256 MB."""
    import torch

    numbers = torch.ones(_READ_BYTES // 4, device=device)  # [numbers]
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        float(numbers.sum())
        seconds.append(time.perf_counter() - started)
    return _READ_BYTES / min(seconds)


class Runs(Protocol):
    """What is measured."""

    def figures(self, count: int, repeats: int) -> Figures:
        """The figures with so many requests at once, each measured so often."""


def runs_of(engine: Engine, workload: Workload, bytes_per_second: float) -> Runs:
    """Measures an engine, by what its model does."""
    source = random.Random(workload.seed)
    if "generate" in engine.info().tasks:
        return _Generating(engine, workload, source, bytes_per_second)
    return _Embedding(engine, workload, source)


def measure(runs: Runs, concurrency: Sequence[int], repeats: int, report: Report) -> list[Figures]:
    """The figures at each concurrency, ascending."""
    runs.figures(min(concurrency), 1)  # to warm up
    found = []
    for done, count in enumerate(sorted(set(concurrency))):
        report(Progress("measuring", done, len(set(concurrency))))
        found.append(runs.figures(count, repeats))
    return found


class _Embedding:
    def __init__(self, engine: Engine, workload: Workload, source: random.Random) -> None:
        self._engine, self._workload, self._source = engine, workload, source

    def figures(self, count: int, repeats: int) -> Figures:
        seconds = statistics.median(self._seconds(count) for _ in range(repeats))
        tokens = count * self._workload.prompt_tokens
        return Figures(count, tokens / seconds, texts_per_second=count / seconds)

    def _seconds(self, count: int) -> float:
        prompts = prompts_of(count, self._workload, self._engine, self._source)
        requests = [lorax_core.EmbedRequest(input=prompt, adapter=adapter) for prompt, adapter in prompts]
        started = time.perf_counter()
        self._engine.run(requests)
        return time.perf_counter() - started


class _Generating:
    def __init__(self, engine: Engine, workload: Workload, source: random.Random, bytes_per_second: float) -> None:
        self._engine, self._workload, self._source = engine, workload, source
        self._bytes_per_second = bytes_per_second

    def figures(self, count: int, repeats: int) -> Figures:
        work = self._workload
        alone = statistics.median(self._seconds(count, 1) for _ in range(repeats))
        prompts = count * work.prompt_tokens / alone
        first: list[float] = []
        further: list[float] = []
        rates: list[float] = []
        for _ in range(repeats):
            started, streams = asyncio.run(self._followed(count))
            first += [events[0][0] - started for events in streams]
            further += [gap for events in streams for gap in gaps(events)]
            rate = decode_rate(streams)
            rates += [rate] if rate is not None else []
        rate = statistics.median(rates) if rates else None
        return Figures(
            count,
            prompts,
            decode_tokens_per_second=rate,
            first_token_ms=percentiles(first),
            further_token_ms=percentiles(further),
            memory_share=self._bytes(count) / self._bytes_per_second * rate / count if rate is not None else None,
        )

    def _requests(self, count: int, tokens: int) -> list[lorax_core.GenerateRequest]:
        prompts = prompts_of(count, self._workload, self._engine, self._source)
        return [
            lorax_core.GenerateRequest(prompt=prompt, adapter=adapter, max_tokens=tokens, ignore_eos=True)
            for prompt, adapter in prompts
        ]

    def _seconds(self, count: int, tokens: int) -> float:
        requests = self._requests(count, tokens)
        started = time.perf_counter()
        self._engine.run(requests)
        return time.perf_counter() - started

    async def _followed(self, count: int) -> tuple[float, list[list[tuple[float, int]]]]:
        """When the streams began, and of each when its events came, with their tokens."""
        started = time.perf_counter()
        streams = [
            self._engine.stream(**request.model_dump()) for request in self._requests(count, self._workload.max_tokens)
        ]

        async def follow(stream: Any) -> list[tuple[float, int]]:
            return [(time.perf_counter(), len(event.token_ids)) async for event in stream if event.token_ids]

        return started, await asyncio.gather(*map(follow, streams))

    def _bytes(self, count: int) -> float:
        """What a decoding step reads, in the middle of the answers."""
        info, work = self._engine.info(), self._workload
        # Only a model with a cache generates.
        of_token = info.kv_cache_bytes / (info.kv_cache_tokens or 1)
        return info.linear_bytes + count * (work.prompt_tokens + work.max_tokens / 2) * of_token


def prompts_of(
    count: int, workload: Workload, engine: Engine, source: random.Random
) -> list[tuple[list[int], str | None]]:
    """Random token ids, each with the adapter whose turn it is."""
    vocab, special = engine.info().vocab_size, engine.special_ids
    plain = [token for token in range(vocab) if token not in special] or list(range(vocab))
    turns = workload.adapters or (None,)
    return [(source.choices(plain, k=workload.prompt_tokens), turns[number % len(turns)]) for number in range(count)]


def decode_rate(streams: Sequence[Sequence[tuple[float, int]]]) -> float | None:
    """Tokens a second of all streams together while all of them decode; None where that is too short to tell.

    Each stream is its events as (time, tokens). They decode together from the first event of the last one on, until the first
    of them ends. A step has an event for each, not all seen at one moment: of each stream the nearest events count.
    """
    begun, ended = max(events[0][0] for events in streams), min(events[-1][0] for events in streams)
    rate = 0.0
    for events in streams:
        first, last = (min(range(len(events)), key=lambda at: abs(events[at][0] - when)) for when in (begun, ended))
        seconds = events[last][0] - events[first][0]
        if seconds <= 0:
            return None
        rate += sum(count for _, count in events[first + 1 : last + 1]) / seconds
    return rate


def gaps(events: Sequence[tuple[float, int]]) -> list[float]:
    """Seconds of each token after the first event, of events as (time, tokens).

    Tokens that come together, as those of a busy machine or of drafts do, share the time since the event before.
    """
    return [(now - before) / tokens for (before, _), (now, tokens) in pairwise(events) for _ in range(tokens)]


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """In milliseconds, by nearest rank; None of no numbers."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    return {f"p{one}": 1e3 * ordered[max(-(-one * len(ordered) // 100) - 1, 0)] for one in PERCENTILES}
