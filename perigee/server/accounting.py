"""Every generating request gets an id, lines in the log and a place in the metrics, however it ends."""

import logging
import secrets
import time

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perigee.server.errors import ApiError
from perigee.server.metrics import Metrics

logger = logging.getLogger(__name__)

_OUTCOMES = {429: "rejected", 503: "unavailable"}


class Accounting:
    """An ASGI application around that of one generating endpoint; answers its ApiErrors."""

    def __init__(self, app: ASGIApp, endpoint: str, id_prefix: str, metrics: Metrics) -> None:
        self._app = app
        self._endpoint = endpoint
        self._id_prefix = id_prefix
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = self._id_prefix + secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        started_s = time.monotonic()
        logger.info("request arrived id=%s endpoint=%s", request_id, self._endpoint)
        outcome = "failed"
        try:
            with self._metrics.running.track_inprogress():
                outcome = await self._answer(scope, receive, _Tagged(send, request_id))
        finally:
            self._metrics.requests.labels(self._endpoint, outcome).inc()
            logger.info("request ended id=%s outcome=%s s=%.3f", request_id, outcome, time.monotonic() - started_s)

    async def _answer(self, scope: Scope, receive: Receive, send: "_Tagged") -> str:
        """Runs the endpoint and says how it ended."""
        try:
            await self._app(scope, receive, send)
        except ClientDisconnect:
            return "cancelled"
        except ApiError as error:
            if not send.started:
                await error.response()(scope, receive, send)
            return _OUTCOMES.get(error.status, "invalid" if error.status < 500 else "failed")
        return "completed"


class _Tagged:
    """Sends on, with the request's id among the headers."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.started = False
        self._send = send
        self._request_id = request_id

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            MutableHeaders(scope=message)["X-Request-Id"] = self._request_id
        await self._send(message)
