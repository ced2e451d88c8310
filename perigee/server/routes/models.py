"""GET /v1/models and /v1/models/{model}."""

import time

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from perigee.server.gateway import Gateway
from perigee.server.responses import Model, ModelList
from perigee.workers.messages import ModelCard


def routes(gateway: Gateway) -> list[Route]:
    created = int(time.time())

    def model(name: str, card: ModelCard) -> Model:
        return Model(
            id=name,
            object="model",
            created=created,
            owned_by="perigee",
            max_model_len=card.max_context,
            vocab_size=card.vocab_size,
        )

    async def every(request: Request) -> Response:
        gateway.tenants.authenticate(request.headers.get("authorization"))
        card = gateway.card()
        models = ModelList(object="list", data=[model(gateway.model_name(card), card)])
        return Response(models.model_dump_json(), media_type="application/json")

    async def one(request: Request) -> Response:
        gateway.tenants.authenticate(request.headers.get("authorization"))
        name = request.path_params["model"]
        card = gateway.card_for(name)
        return Response(model(name, card).model_dump_json(), media_type="application/json")

    return [Route("/v1/models", every), Route("/v1/models/{model:path}", one)]
