"""Numbers of a running server in Prometheus' format.

Decides which metrics there are, and that labels which clients choose cannot grow without bound. Knows nothing of HTTP. Every
server has a registry of its own, so two live in one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorax_core.serving.engine import Engine
from lorax_core.serving.prepare import Result
from lorax_core.types import Completion

ADAPTER_LABELS: Final = 200
"""Adapters with a label of their own; requests may name any source, so later ones are counted together."""
_OTHERS: Final = "(others)"
_BASE: Final = "(base)"
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class Metrics:
    """What one server counts. Safe to call from any thread."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self._labels: dict[str, str] = {}
        registry = self.registry
        self._requests = Counter(
            "lorax_http_requests", "Answered HTTP requests.", ("route", "status"), registry=registry
        )
        self._seconds = Histogram(
            "lorax_http_request_seconds", "From a request's headers to the end of its answer.", ("route",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._answers = Counter(
            "lorax_answers", "Answers of the engine by task and adapter.", ("task", "adapter"), registry=registry
        )
        self._tokens = Counter(
            "lorax_tokens", "Tokens by kind (prompt, cached, completion, draft) and adapter.", ("kind", "adapter"),
            registry=registry,
        )  # fmt: skip
        self._first = Histogram(
            "lorax_time_to_first_token_seconds", "From a request's arrival to its first token.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._each = Histogram(
            "lorax_time_per_token_seconds", "Mean time of a token after the first, of each completion.",
            buckets=_TOKEN_SECONDS, registry=registry,
        )  # fmt: skip
        self.queued = Histogram(
            "lorax_queue_seconds", "From a request's arrival to its first step.", buckets=_SECONDS, registry=registry
        )
        self._refusals = Counter("lorax_refusals", "Requests that were refused, by kind.", ("kind",), registry=registry)
        self.in_flight = Gauge("lorax_in_flight", "Sequences that were admitted and not answered.", registry=registry)
        self._hung_up = Counter(
            "lorax_client_disconnects", "Requests whose client hung up before the answer.", registry=registry
        )
        registry.register(_EngineNumbers(engine))

    def answered(self, route: str, status: int, seconds: float) -> None:
        """One HTTP request is over."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def refused(self, kind: str) -> None:
        """A request was refused, by the kind of `errors.KINDS`."""
        self._refusals.labels(kind).inc()

    def hung_up(self) -> None:
        """A client did not wait for its answer."""
        self._hung_up.inc()

    def result(self, task: str, adapter: str | Mapping[str, float] | None, result: Result) -> None:
        """One request was answered by the engine."""
        label = self._label(adapter)
        self._answers.labels(task, label).inc()
        usage = result.usage
        for kind, count in (
            ("prompt", usage.prompt_tokens),
            ("cached", usage.cached_tokens),
            ("completion", completion_tokens(result)),
            ("draft", sum(one.usage.accepted_tokens for one in _completions(result))),
        ):
            if count:
                self._tokens.labels(kind, label).inc(count)

    def times(self, first: float, end: float, tokens: int) -> None:
        """A completion's first token came `first` seconds after its request, and its last of `tokens` after `end`."""
        self._first.observe(first)
        if tokens > 1:
            self._each.observe((end - first) / (tokens - 1))

    def render(self) -> bytes:
        """All of it as text."""
        return generate_latest(self.registry)

    def _label(self, adapter: str | Mapping[str, float] | None) -> str:
        if adapter is None:
            return _BASE
        name = adapter_name(adapter)
        if name not in self._labels:
            self._labels[name] = name[:200] if len(self._labels) < ADAPTER_LABELS else _OTHERS
        # What is beyond the limit is forgotten again: the table itself must not grow.
        return self._labels[name] if self._labels[name] != _OTHERS else self._labels.pop(name)


def adapter_name(adapter: str | Mapping[str, float]) -> str:
    """What an adapter, or a weighted sum of several, is called where numbers are kept."""
    return adapter if isinstance(adapter, str) else "+".join(sorted(adapter))


def completion_tokens(result: Result) -> int:
    """Tokens that were generated for a result, of all its alternatives."""
    return sum(one.usage.completion_tokens for one in _completions(result))


def _completions(result: Result) -> list[Completion]:
    return [result, *result.alternatives] if isinstance(result, Completion) else []


class _EngineNumbers(Collector):
    """What the engine counts itself, read when the metrics are."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are fixed, and the registry need not read an engine for them."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The families, newly read."""
        info = self._engine.info()
        step, totals = info.last_step, info.totals
        for name, what, value in (
            ("lorax_running", "Sequences in the last step and after it.", step.running if step else 0),
            ("lorax_waiting", "Sequences that wait for a step.", step.waiting if step else 0),
            ("lorax_kv_cache_pages_used", "Pages of the KV cache in use.", step.pages_used if step else 0),
            ("lorax_kv_cache_pages", "Pages of the KV cache.", step.pages if step else 0),
            ("lorax_adapters_loaded", "Adapters that have a name.", len(self._engine.adapters.list())),
            ("lorax_last_step_seconds", "What the last step took.", step.seconds if step else 0.0),
        ):
            yield GaugeMetricFamily(name, what, value=value)
        for name, what, count in (
            ("lorax_steps", "Steps of the engine.", totals.steps),
            ("lorax_step_seconds", "Time of all steps.", totals.seconds),
            ("lorax_engine_prompt_tokens", "Tokens of inputs that were computed.", totals.prompt_tokens),
            ("lorax_engine_decode_tokens", "Newest tokens of answers that were computed.", totals.decode_tokens),
            ("lorax_engine_failed", "Answers that ended with an error.", totals.failed),
            ("lorax_adapter_loads", "Adapters that were brought to the device.", self._engine.adapters.loads),
            ("lorax_adapter_evictions", "Adapters that made room for others.", self._engine.adapters.evictions),
        ):
            yield CounterMetricFamily(name, what, value=count)
