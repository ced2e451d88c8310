"""Reading a request's body: no more of it than is allowed, and only if it claims to be JSON."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from perigee.server.errors import BodyTooLarge, UnsupportedMediaType, from_validation

M = TypeVar("M", bound=BaseModel)


async def read(request: Request, kind: type[M], max_bytes: int) -> M:
    """The body as a checked message. Raises ApiError, or ClientDisconnect if the client hangs up on the way."""
    _check_media_type(request)
    data = await _read_bytes(request, max_bytes)
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise from_validation(error) from None


def _check_media_type(request: Request) -> None:
    # Not only for form's sake: a web page can post anything else to a loopback address without asking first.
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType(f"content-type: {media_type!r} is not served; allowed is application/json")


async def _read_bytes(request: Request, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced) > max_bytes:
        raise _too_large(max_bytes)
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(data)


def _too_large(max_bytes: int) -> BodyTooLarge:
    # The rest of the body is never read, so the connection cannot be used again.
    return BodyTooLarge(f"the request's body is larger than {max_bytes} bytes", headers={"Connection": "close"})
