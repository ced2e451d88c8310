"""GET /requests/{id}/receipt: what was decided about a request, why, and what came of it."""

import json

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from perigee.server.conductor_client import ConductorLost
from perigee.server.errors import ReceiptNotFound, Unavailable
from perigee.server.gateway import Gateway


def routes(gateway: Gateway) -> list[Route]:
    async def receipt(request: Request) -> Response:
        tenant = gateway.tenants.authenticate(request.headers.get("authorization"))
        request_id = request.path_params["request_id"]
        try:
            reply = await gateway.conductor.receipts(request_id, tenant.name)
        except ConductorLost:
            raise Unavailable("the Conductor, which keeps the receipts, does not answer") from None
        if not reply.documents:
            raise ReceiptNotFound(
                f"there is no receipt of a request {request_id!r} of yours; kept are those that run, and of those that "
                f"ended the last {reply.limit} since the Conductor's start"
            )
        return JSONResponse({"id": request_id, "choices": [json.loads(each) for each in reply.documents]})

    return [Route("/requests/{request_id}/receipt", receipt)]
