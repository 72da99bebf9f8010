"""One span for each request, and what it says."""

from __future__ import annotations

import asyncio
import logging

import httpx
import pytest
from loopback import asking
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import lorax_core
from lorax_core.server.app import build_app
from lorax_core.server.tracing import Traces, traces_from_environment

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def engine(repository):
    checkpoint, topic = repository / "examples/tiny_qwen2/model", repository / "examples/tiny_qwen2/adapters/topic"
    with lorax_core.load(checkpoint, adapters={"topic": str(topic)}, kv_cache_tokens=1_024) as engine:
        yield engine


@pytest.fixture
def spans(engine):
    """What was traced of requests to a server; each is a body of `POST /ask`, or None for an unknown route."""

    def ask(*bodies, headers=None):
        exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        app = build_app(engine, model_name="base", traces=Traces(provider))
        app.include_router(asking(app.state.gateway))

        async def inside():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server") as client:
                for body in bodies:
                    await client.post("/ask" if body else "/nothing", json=body, headers=headers)

        asyncio.run(inside())
        return exporter.get_finished_spans()

    return ask


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_span_with_its_task_tokens_and_times(spans, stream):
    found = spans({"options": {"prompt": "a b", "max_tokens": 3, "ignore_eos": True}, "stream": stream})

    (span,) = found
    said = span.attributes
    assert (span.name, span.kind, span.status.status_code) == ("POST /ask", SpanKind.SERVER, StatusCode.UNSET)
    assert said["lorax.task"] == "generate"
    assert "lorax.adapter" not in said
    assert said["http.response.status_code"] == 200
    assert said["gen_ai.usage.output_tokens"] == 3
    assert said["gen_ai.usage.input_tokens"] > 0
    assert 0 <= said["gen_ai.latency.time_in_queue"] <= said["gen_ai.latency.time_to_first_token"]
    assert "a b" not in str(said)


def test_adapters_are_named_and_failures_are_marked(spans):
    found = spans({"task": "classify", "options": {"input": "a", "adapter": "topic"}}, {"options": {}}, None)

    assert found[0].attributes["lorax.adapter"] == "topic"
    assert [span.attributes["http.response.status_code"] for span in found] == [200, 422, 404]
    assert [span.name for span in found] == ["POST /ask", "POST /ask", "POST (none)"]


def test_what_was_not_sent_yet_is_sent_when_a_server_ends(engine):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=3_600_000))
    app = build_app(engine, traces=Traces(provider))

    async def inside():
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server") as client,
        ):
            await client.get("/health")
            return len(exporter.get_finished_spans())

    assert (asyncio.run(inside()), len(exporter.get_finished_spans())) == (0, 1)


def test_a_span_belongs_to_the_trace_of_its_client(spans):
    (span,) = spans({"options": {"prompt": "a", "max_tokens": 1}}, headers={"traceparent": PARENT})

    assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_SERVICE_NAME": "mine"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
    ],
)
def test_nothing_is_traced_unless_the_environment_names_where(environ):
    assert traces_from_environment(environ) is None


def test_an_endpoint_turns_traces_on(monkeypatch):
    made = traces_from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"})

    assert isinstance(made, Traces)
    made.close()


def test_without_the_extra_a_server_says_so_and_serves(monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)

    with caplog.at_level(logging.WARNING):
        found = traces_from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"})

    assert found is None
    assert "lorax-core[tracing]" in caplog.text
