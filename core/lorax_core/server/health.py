"""Whether a server lives, is ready, and what it counts: `/health`, `/ready`, `/metrics`.

Decides what an orchestrator and Prometheus are told. Knows nothing of any API.
"""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from lorax_core.server.gateway import Gateway


def health_routes(gateway: Gateway) -> APIRouter:
    """The routes of one server."""
    routes = APIRouter(tags=["health"])

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health")
    async def health() -> JSONResponse:
        """200 while the engine lives; 503 once it broke, when only a restart helps."""
        alive = not gateway.engine.closed
        return JSONResponse({"status": "ok" if alive else "closed"}, 200 if alive else 503)

    @routes.head("/ready", include_in_schema=False)
    @routes.get("/ready")
    async def ready() -> JSONResponse:
        """200 while requests are taken; 503 while the server drains."""
        state = "closed" if gateway.engine.closed else "draining" if gateway.draining else "ready"
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """All metrics in Prometheus' text format."""
        return Response(await gateway.in_thread(gateway.metrics.render), media_type=CONTENT_TYPE_LATEST)

    return routes
