"""An endpoint on a real loopback socket that answers completions as a test tells it to."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


class Answer:
    """One request's answer in the making."""

    def __init__(self, request: web.Request, body: dict[str, Any], headers: dict[str, str]) -> None:
        self.body = body
        self._request = request
        self._response = web.StreamResponse(headers={"Content-Type": "text/event-stream", **headers})

    async def token(self, text: str = "x") -> None:
        await self.send({"choices": [{"index": 0, "text": text, "finish_reason": None}], "usage": None})

    async def usage(
        self, cached_tokens: int = 0, completion_tokens: int | None = None, predicted: dict[str, float] | None = None
    ) -> None:
        usage: dict[str, object] = {
            "prompt_tokens": len(self.body["prompt"]),
            "completion_tokens": self.body["max_tokens"] if completion_tokens is None else completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }
        if predicted is not None:
            usage["perigee_predicted"] = predicted
        await self.send({"choices": [], "usage": usage})

    async def done(self) -> None:
        await self._write(b"data: [DONE]\n\n")

    async def send(self, chunk: object) -> None:
        await self._write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    async def whole(self) -> None:
        """What is asked for, one token a chunk, nothing cached."""
        for _ in range(self.body["max_tokens"]):
            await self.token()
        await self.usage()
        await self.done()

    def hang_up(self) -> None:
        assert self._request.transport is not None
        self._request.transport.abort()

    async def _write(self, data: bytes) -> None:
        if not self._response.prepared:
            await self._response.prepare(self._request)
        await self._response.write(data)

    async def end(self) -> web.StreamResponse:
        if not self._response.prepared:
            await self._response.prepare(self._request)
        await self._response.write_eof()
        return self._response


Script = Callable[[Answer], Awaitable[int | None]]
"""Answers one request; a number that it returns is the status of an error response instead."""


@dataclass
class ScriptedEndpoint:
    """`script` answers completions, `bodies` are the requests so far, in order of arrival.

    With a `key` it answers nobody without it. With a `cluster` it is a Perigee endpoint, whose requests have a
    `receipt` each; `asked` are the paths of what was asked about these. `first_ended` is set when the client sends a
    second request over a connection, so has read a first answer whole.
    """

    script: Script = Answer.whole
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "small", "vocab_size": 512}])
    url: str = ""
    key: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    cluster: dict[str, Any] | None = None
    receipt: dict[str, Any] | None = None
    asked: list[str] = field(default_factory=list)
    first_ended: asyncio.Event = field(default_factory=asyncio.Event)
    connections: set[object] = field(default_factory=set)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self._authorize(request)
        headers = {"X-Request-Id": f"cmpl-{len(self.bodies)}"} if self.cluster else {}
        answer = Answer(request, await request.json(), headers)
        self.bodies.append(answer.body)
        if request.transport in self.connections:
            self.first_ended.set()
        self.connections.add(request.transport)
        status = await self.script(answer)
        if status is not None:
            return web.json_response({"error": {"message": f"scripted {status}"}}, status=status, headers=headers)
        return await answer.end()

    async def list_models(self, request: web.Request) -> web.StreamResponse:
        self._authorize(request)
        return web.json_response({"object": "list", "data": self.models})

    def _authorize(self, request: web.Request) -> None:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            raise web.HTTPUnauthorized

    async def tell(self, request: web.Request) -> web.StreamResponse:
        """Of the cluster, or a receipt."""
        self._authorize(request)
        self.asked.append(request.path)
        document = self.cluster if request.path == "/cluster" else self.receipt
        return web.json_response(document or {}, status=200 if document else 404)


@asynccontextmanager
async def serve(endpoint: ScriptedEndpoint) -> AsyncIterator[ScriptedEndpoint]:
    app = web.Application()
    app.router.add_post("/v1/completions", endpoint.complete)
    app.router.add_get("/v1/models", endpoint.list_models)
    app.router.add_get("/cluster", endpoint.tell)
    app.router.add_get("/requests/{id}/receipt", endpoint.tell)
    runner = web.AppRunner(app, shutdown_timeout=0, access_log=None, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        endpoint.url = f"http://{host}:{port}"
        yield endpoint
    finally:
        await runner.cleanup()


def by_prompt_length(**scripts: Script) -> Script:
    """Chooses among scripts named `tokens_N` by the length of the prompt."""

    async def choose(answer: Answer) -> int | None:
        return await scripts[f"tokens_{len(answer.body['prompt'])}"](answer)

    return choose


async def forever(answer: Answer) -> None:
    await asyncio.Event().wait()
