"""What the two generating endpoints have in common: from an HTTP request to a generation, and back."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from perigee.server import body
from perigee.server.gateway import Gateway
from perigee.server.generation import Choice, Generation
from perigee.server.intake import Call, R
from perigee.server.stream import Form, send_stream, send_whole, unless_disconnected


class GenerateEndpoint(ABC, Generic[R]):
    """An ASGI application for one POST endpoint."""

    path: ClassVar[str]

    def __init__(self, gateway: Gateway, kind: type[R]) -> None:
        self._gateway = gateway
        self._kind = kind

    @abstractmethod
    async def choices(self, call: Call[R]) -> Sequence[Sequence[Choice]]:
        """What is to be generated, by prompt. Raises ApiError."""

    @abstractmethod
    def form(self, call: Call[R]) -> Form:
        """How the answer is written down."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError, or ClientDisconnect when the client has gone and everything is cancelled."""
        call = await self._call(Request(scope, receive))
        generation = Generation(self._gateway.dispatcher, self._gateway.closing, await self.choices(call))
        self._gateway.metrics.prompt_tokens.inc(generation.tally.prompt_tokens)
        form = self.form(call)
        if call.request.stream:
            work = send_stream(generation, form, call.request.include_usage, send)
        else:
            work = send_whole(generation, form, scope, receive, send)
        await unless_disconnected(receive, work)

    async def _call(self, request: Request) -> Call[R]:
        arrived_s = time.monotonic()
        tenant = self._gateway.tenants.authenticate(request.headers.get("authorization"))
        async with self._gateway.closing.guarded():
            message = await body.read(request, self._kind, self._gateway.config.max_body_bytes)
        card = self._gateway.card_for(message.model)
        return Call(request.state.request_id, arrived_s, tenant, message, card, self._gateway)
