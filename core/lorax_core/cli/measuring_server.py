"""How fast a running server answers: rates and latencies, as its clients see them.

Decides how prompts are made without knowing a tokenizer, and how times of pieces become figures. Knows nothing of the command
line. What is measured is server, connection and client together.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import string
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Final

import lorax_core
from lorax_core.cli.measuring import Figures, Workload, decode_rate, gaps, percentiles
from lorax_core.cli.served import Server
from lorax_core.errors import RequestError
from lorax_core.types import Usage

_WORDS: Final = 64
"""Of the text by which it is measured how many tokens a word has."""
_Pieces = list[tuple[float, int]]
"""When pieces came, and of how many tokens."""


class ServedRuns:
    """Measures a server. Prompts are random words, no two the same, of about as many tokens as asked for; usage counts them."""

    def __init__(self, server: Server, workload: Workload) -> None:
        self._server, self._workload = server, workload
        self._source = random.Random(workload.seed)
        self._over = False
        _, usage = self._answer(self._words(_WORDS), None, 1)
        self._of_word = usage.prompt_tokens / _WORDS

    def figures(self, count: int, repeats: int) -> Figures:
        """With so many requests at once."""
        prompts: list[float] = []
        rates: list[float] = []
        first: list[float] = []
        further: list[float] = []
        for _ in range(repeats):
            started, answers = self._at_once(count, 1)
            seconds = max(pieces[-1][0] for pieces, _ in answers) - started
            prompts.append(sum(usage.prompt_tokens for _, usage in answers) / seconds)
            started, answers = self._at_once(count, self._workload.max_tokens)
            streams = [pieces for pieces, _ in answers]
            first += [pieces[0][0] - started for pieces in streams]
            further += [gap for pieces in streams for gap in gaps(pieces)]
            rate = decode_rate(streams)
            rates += [rate] if rate is not None else []
        return Figures(
            count,
            statistics.median(prompts),
            decode_tokens_per_second=statistics.median(rates) if rates else None,
            first_token_ms=percentiles(first),
            further_token_ms=percentiles(further),
        )

    def _at_once(self, count: int, tokens: int) -> tuple[float, list[tuple[_Pieces, Usage]]]:
        """When the requests began, and what came of each."""
        turns = self._workload.adapters or (None,)
        words = max(1, round(self._workload.prompt_tokens / self._of_word))
        prompts = [self._words(words) for _ in range(count)]
        with ThreadPoolExecutor(count) as threads:
            started = time.perf_counter()
            jobs = [
                threads.submit(self._answer, prompt, turns[number % len(turns)], tokens)
                for number, prompt in enumerate(prompts)
            ]
            try:
                for job in as_completed(jobs):
                    job.result()  # the first that fails ends all
                return started, [job.result() for job in jobs]
            except BaseException:
                # The others would be waited for until their answers end.
                self._over = True
                raise

    def _answer(self, prompt: str, adapter: str | None, tokens: int) -> tuple[_Pieces, Usage]:
        request = lorax_core.GenerateRequest(prompt=prompt, adapter=adapter, max_tokens=tokens, ignore_eos=True)
        times: list[float] = []
        usage: Usage | None = None
        with contextlib.closing(self._server.stream(request)) as stream:
            for event in stream:
                if self._over:
                    break
                if event.usage is not None:
                    usage = event.usage
                else:
                    times.append(time.perf_counter())
        if usage is None or not times or usage.prompt_tokens < 1:
            raise RequestError(
                f"{self._server.url:.200} does not say how many tokens an answer has",
                hint="a server is measured that knows stream_options.include_usage",
            )
        return spread(times, usage.completion_tokens), usage

    def _words(self, count: int) -> str:
        return " ".join("".join(self._source.choices(string.ascii_lowercase, k=5)) for _ in range(count))


def spread(times: list[float], tokens: int) -> _Pieces:
    """Pieces with their tokens: a piece may have several, of which only the sum is known, or none that is text yet."""
    ends = [round(tokens * number / len(times)) for number in range(len(times) + 1)]
    return [(when, after - before) for when, before, after in zip(times, ends, ends[1:], strict=False)]
