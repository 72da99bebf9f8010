"""One engine as an ASGI application.

Decides which APIs there are and how errors of any of them become answers. Knows nothing of sockets: `run` serves it, and tests
call it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request

from lorax_core.errors import LoraxError, nearest
from lorax_core.server.adapters import adapter_routes
from lorax_core.server.document import correct_document
from lorax_core.server.errors import Refused, failure
from lorax_core.server.gateway import ClientGone, Gateway
from lorax_core.server.health import health_routes
from lorax_core.server.logs import log_failure
from lorax_core.server.lorax.routes import lorax_routes
from lorax_core.server.metrics import Metrics
from lorax_core.server.middleware import EveryRequest, refusal
from lorax_core.server.names import ModelNames, base_name
from lorax_core.server.openai.routes import openai_routes
from lorax_core.server.options import ServerOptions
from lorax_core.server.page.routes import page_routes
from lorax_core.server.rerank import rerank_routes
from lorax_core.server.schemas import invalid
from lorax_core.server.tei.routes import tei_routes
from lorax_core.server.tracing import Traces
from lorax_core.serving.engine import Engine
from lorax_core.version import __version__

_ROUTES: Final = "GET /openapi.json lists routes and their methods"


def build_app(
    engine: Engine,
    options: ServerOptions | None = None,
    *,
    model_name: str | None = None,
    traces: Traces | None = None,
) -> FastAPI:
    """The application that answers from `engine`, which stays the caller's to close.

    `app.state.gateway` is its `Gateway`. `traces` are closed when it ends. Without a `model_name` the base is called as its
    checkpoint; of a folder that is its last part, and all of it means the base too.
    """
    options = options or ServerOptions()
    metrics = Metrics(engine)
    given, checkpoint = model_name or options.model_name, engine.options.checkpoint
    names = ModelNames(given or base_name(checkpoint), engine.adapters, source=None if given else checkpoint)
    gateway = Gateway(engine, options, metrics, names)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        gateway.close()
        if traces is not None:
            await asyncio.to_thread(traces.close)

    # The pages of FastAPI load their scripts from elsewhere; /openapi.json is what tools read.
    # FastAPI's own traces would be spans of parts, and could hold what clients sent.
    silent: Any = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
    app = FastAPI(
        title="lorax",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        telemetry=silent,
    )
    app.state.gateway = gateway
    app.add_middleware(EveryRequest, options=options, metrics=metrics, traces=traces)
    if options.cors_origins:
        # Last, so outermost: a browser asks without a key whether it may ask.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id", "X-Request-Timeout"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    _answer_errors(app, metrics)
    correct_document(app, needs_key=bool(options.api_keys))
    for routes in (health_routes, page_routes, openai_routes, lorax_routes, tei_routes, rerank_routes, adapter_routes):
        app.include_router(routes(gateway))
    return app


def _answer_errors(app: FastAPI, metrics: Metrics) -> None:
    """Errors of all routes become answers in the shape of their API."""

    def answer(request: Request, error: LoraxError) -> Response:
        found = failure(error)
        metrics.refused(found.kind)
        log_failure(found, error)
        return refusal(request.url.path, found)

    async def deliberate(request: Request, error: Any) -> Response:
        return answer(request, error)

    async def wrong(request: Request, error: Any) -> Response:
        return answer(request, invalid(error.errors()))

    async def http(request: Request, error: Any) -> Response:
        # FastAPI hides in its own error what went wrong while a body was read.
        if isinstance(error.__cause__, LoraxError):
            return answer(request, error.__cause__)
        if isinstance(error.__cause__, ClientDisconnect):
            raise ClientGone from error
        if error.status_code == 405:
            refused = Refused("wrong_method", f"this route does not accept {request.method}", hint=_ROUTES)
        elif error.status_code == 404:
            path = request.url.path[:200]
            close = nearest(path, app.openapi()["paths"])
            meant = "" if close is None else f"did you mean {close}? "
            refused = Refused("no_route", f"there is no route {path}", hint=meant + _ROUTES)
        else:
            refused = Refused("invalid", str(error.detail), hint="send JSON, as GET /openapi.json describes it")
        found = answer(request, refused)
        found.headers.update(error.headers or {})  # of a wrong method, those that there are
        return found

    app.add_exception_handler(LoraxError, deliberate)
    app.add_exception_handler(RequestValidationError, wrong)
    app.add_exception_handler(HTTPException, http)
