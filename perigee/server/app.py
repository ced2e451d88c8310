"""The front end's process: an HTTP server around the routes, and its life from start to stop."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from perigee.server.accounting import Accounting
from perigee.server.config import ServerConfig
from perigee.server.errors import ApiError, from_status
from perigee.server.gateway import Gateway
from perigee.server.routes import cluster, health, models, receipts
from perigee.server.routes.chat import ChatEndpoint
from perigee.server.routes.completions import CompletionsEndpoint
from perigee.workers.model.checkpoint import resolve, tokenizer_digest
from perigee.workers.model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_KEEP_ALIVE_S = 65  # longer than usual clients keep an idle connection, so that they are the ones to close it

_FAREWELL_S = 2  # for the errors of what outlived the grace period to go out, before connections are cut


def build(gateway: Gateway) -> Starlette:
    """The ASGI application over one gateway."""
    completions = Accounting(CompletionsEndpoint(gateway), "completions", "cmpl-", gateway.metrics)
    chat = Accounting(ChatEndpoint(gateway), "chat", "chatcmpl-", gateway.metrics)
    routes: list[BaseRoute] = [
        Route(CompletionsEndpoint.path, completions, methods=["POST"]),
        Route(ChatEndpoint.path, chat, methods=["POST"]),
        *models.routes(gateway),
        *cluster.routes(gateway),
        *receipts.routes(gateway),
        *health.routes(gateway),
    ]
    handlers = {ApiError: _api_error, HTTPException: _routing_error, Exception: _bug}
    return Starlette(routes=routes, exception_handlers=handlers)


async def run(config: ServerConfig) -> None:
    """Serves until cancelled. Raises CheckpointError, TokenizerError, KeysFileError or OSError if it cannot start."""
    directory = await asyncio.to_thread(resolve, config.model, config.dtype)
    tokenizer = await asyncio.to_thread(Tokenizer.load, directory)
    digest = await asyncio.to_thread(tokenizer_digest, directory)
    async with Gateway.opened(config, tokenizer, digest) as gateway:
        with _listening(config.host, config.port) as listener:
            logger.info("server listening url=http://%s:%d", config.host, listener.getsockname()[1])
            await serve(gateway, listener)


async def serve(gateway: Gateway, listener: socket.socket) -> None:
    """Answers on `listener` until cancelled; then running requests have the grace period to end, or are told off."""
    grace_s = gateway.config.shutdown_grace_s
    server = _Server(
        uvicorn.Config(
            build(gateway),
            loop="none",
            http="httptools",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=grace_s + _FAREWELL_S,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await asyncio.shield(serving)
    finally:
        server.should_exit = True
        over = asyncio.get_running_loop().call_later(grace_s, gateway.closing.end)
        await serving
        over.cancel()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the process, which cancels us."""
        yield


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _routing_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    return from_status(error.status_code, f"{where}: {error.detail}", error.headers).response()


async def _bug(request: Request, error: Exception) -> Response:
    # The trace is for the log, where the server puts it, not for the client.
    return ApiError("the server failed to answer this request").response()
