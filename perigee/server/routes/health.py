"""GET /health and /metrics, for supervisors and Prometheus. Neither asks for a key: they tell no tenant's secrets."""

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from perigee.server.errors import retry_after
from perigee.server.gateway import Gateway


def routes(gateway: Gateway) -> list[Route]:
    async def health(request: Request) -> Response:
        missing = gateway.missing(await gateway.conductor.refresh())
        if missing:
            body = {"status": "unavailable", "missing": missing}
            return JSONResponse(body, status_code=503, headers=retry_after(1.0))
        return JSONResponse({"status": "ok", "missing": []})

    async def metrics(request: Request) -> Response:
        return Response(gateway.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    return [Route("/health", health), Route("/metrics", metrics)]
