"""Sending an answer, as a stream of server-sent events or whole, for as long as somebody listens."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Protocol

from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from perigee.server.errors import ApiError
from perigee.server.generation import Generation, Tally
from perigee.server.transcript import Piece

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy must not collect tokens
]
_DONE = b"data: [DONE]\n\n"


class Form(Protocol):
    """How one endpoint writes down an answer."""

    def chunks(self, piece: Piece) -> Iterable[BaseModel]:
        """The streamed messages for a piece."""

    def usage_chunk(self, tally: Tally) -> BaseModel:
        """The last message of a stream whose client asked for usage."""

    def whole(self, pieces: Iterable[Piece], tally: Tally) -> BaseModel:
        """The answer in one message."""


async def send_stream(generation: Generation, form: Form, include_usage: bool, send: Send) -> None:
    """Raises ApiError if nothing has been sent yet; later it tells the client in an event, and raises it too."""
    async with generation.running():
        pieces = generation.pieces()
        first = await anext(pieces)  # a request that is turned away raises here, and gets its own status
        await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
        try:
            await _send_pieces(first, pieces, form, send)
        except ApiError as error:
            await _send_body(send, _event(json.dumps(error.body()).encode()), more=False)
            raise
        usage = _event(_json(form.usage_chunk(generation.tally))) if include_usage else b""
        await _send_body(send, usage + _DONE, more=False)


async def send_whole(generation: Generation, form: Form, scope: Scope, receive: Receive, send: Send) -> None:
    """Raises ApiError; nothing has been sent then."""
    async with generation.running():
        pieces = [piece async for piece in generation.pieces()]
    response = Response(_json(form.whole(pieces, generation.tally)), media_type="application/json")
    await response(scope, receive, send)


async def unless_disconnected(receive: Receive, work: Coroutine[None, None, None]) -> None:
    """Runs `work` to its end, or cancels it as soon as the client hangs up, which raises ClientDisconnect.

    The request's body must have been read: all that `receive` can say then is that the client is gone.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_pieces(first: Piece, rest: AsyncIterator[Piece], form: Form, send: Send) -> None:
    await _send_piece(first, form, send)
    async for piece in rest:
        await _send_piece(piece, form, send)


async def _send_piece(piece: Piece, form: Form, send: Send) -> None:
    await _send_body(send, b"".join(_event(_json(chunk)) for chunk in form.chunks(piece)), more=True)


async def _send_body(send: Send, body: bytes, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _json(message: BaseModel) -> bytes:
    # Left out is what was not set, so that each form decides itself where null must stand.
    return message.model_dump_json(exclude_unset=True).encode()
