"""One span for each request, for OpenTelemetry (the extra `lorax-core[tracing]`).

Decides whether a server is traced, and what a span says: never a prompt or an answer. Knows nothing of routes. opentelemetry is
imported only where a server is traced.
"""

from __future__ import annotations

import contextvars
import importlib
import os
from collections.abc import Mapping
from typing import Any, Final

from lorax_core.server.logs import log
from lorax_core.version import __version__

Span = Any
"""A span of OpenTelemetry's."""
_span: Final[contextvars.ContextVar[Span]] = contextvars.ContextVar("lorax_span", default=None)
_EXPORTER: Final = "opentelemetry.exporter.otlp.proto.http.trace_exporter"


def note(**attributes: Any) -> None:
    """Add attributes to the span of the request that is being answered, if there is one; "__" stands for a dot."""
    span = _span.get()
    if span is not None:
        for name, value in attributes.items():
            if value is not None:
                span.set_attribute(name.replace("__", "."), value)


class Traces:
    """Spans of one server, made by a provider of OpenTelemetry's."""

    def __init__(self, provider: Any) -> None:
        self._tracer = provider.get_tracer("lorax_core", __version__)
        self._trace: Any = importlib.import_module("opentelemetry.trace")
        found = importlib.import_module("opentelemetry.trace.propagation.tracecontext")
        self._propagator: Any = found.TraceContextTextMapPropagator()
        self._provider = provider

    def begin(self, method: str, headers: Mapping[str, str]) -> Span:
        """The span of a request, within its client's where it says which (`traceparent`); `note` adds to it from now on."""
        parent = self._propagator.extract(headers)
        span = self._tracer.start_span(method, context=parent, kind=self._trace.SpanKind.SERVER)
        _span.set(span)
        return span

    def end(self, span: Span, method: str, route: str, status: int) -> None:
        """A request was answered."""
        span.update_name(f"{method} {route}")
        note(http__request__method=method, http__route=route, http__response__status_code=status)
        if status >= 500:  # those below are the client's
            span.set_status(self._trace.StatusCode.ERROR)
        _span.set(None)
        span.end()

    def close(self) -> None:
        """Send what was not sent yet."""
        shutdown = getattr(self._provider, "shutdown", None)
        if shutdown is not None:
            shutdown()


def traces_from_environment(environ: Mapping[str, str] = os.environ) -> Traces | None:
    """Traces sent by OTLP over HTTP where OpenTelemetry's own variables name an endpoint, else None."""
    endpoint = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    disabled = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if disabled or not endpoint or environ.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    try:
        exporter: Any = importlib.import_module(_EXPORTER)
        sdk: Any = importlib.import_module("opentelemetry.sdk.trace")
        export: Any = importlib.import_module("opentelemetry.sdk.trace.export")
        resources: Any = importlib.import_module("opentelemetry.sdk.resources")
    except ImportError as error:
        log.warning("OTEL_* is set and %s is not installed: pip install 'lorax-core[tracing]'", error.name)
        return None
    name = {} if environ.get("OTEL_SERVICE_NAME") else {"service.name": "lorax"}
    provider = sdk.TracerProvider(resource=resources.Resource.create(name))
    provider.add_span_processor(export.BatchSpanProcessor(exporter.OTLPSpanExporter()))
    return Traces(provider)
