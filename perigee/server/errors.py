"""What a client is told when it cannot have its answer, in OpenAI's form. Every error of the API is made here."""

import math
from collections.abc import Mapping

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import JSONResponse

Json = dict[str, object]


class ApiError(Exception):
    """Root of this package's errors: an HTTP status and what OpenAI's error object says about it."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> Json:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


class InvalidRequest(ApiError):
    """A field is missing, malformed, out of range or not served."""

    status = 400
    type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and output do not fit the model's context, or any worker's memory."""

    code = "context_length_exceeded"


class Unauthorized(ApiError):
    """No API key, or an unknown one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class ModelNotFound(ApiError):
    """The request names a model that this cluster does not serve."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class ReceiptNotFound(ApiError):
    """Of this request no receipt is kept, or it is another tenant's."""

    status = 404
    type = "invalid_request_error"
    code = "receipt_not_found"


class BodyTooLarge(ApiError):
    """The request's body is larger than this server reads."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class UnsupportedMediaType(ApiError):
    """The request's body does not claim to be JSON."""

    status = 415
    type = "invalid_request_error"


class Overloaded(ApiError):
    """The cluster cannot take this request now without breaking its promises to others. Predictions are in seconds,
    None where nobody made any."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"

    def __init__(
        self,
        message: str,
        retry_after_s: float,
        predicted_ttft_s: float | None = None,
        predicted_tbt_s: float | None = None,
    ) -> None:
        super().__init__(message, headers=retry_after(retry_after_s))
        self._predicted = {"predicted_ttft_s": predicted_ttft_s, "predicted_tbt_s": predicted_tbt_s}

    def body(self) -> Json:
        body = super().body()
        error = body["error"]
        assert isinstance(error, dict)
        return {"error": {**error, **self._predicted}}


class Unavailable(ApiError):
    """A part of the cluster that this request needs is not there."""

    status = 503
    code = "unavailable"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, headers=retry_after(retry_after_s))


class TimedOut(ApiError):
    """The request outlived its deadline."""

    status = 504
    type = "timeout_error"
    code = "timeout"


class GenerationFailed(ApiError):
    """Every attempt failed."""

    code = "generation_failed"


def retry_after(seconds: float) -> dict[str, str]:
    """The header, in whole seconds as HTTP wants it, and never 0."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def from_status(status: int, message: str, headers: Mapping[str, str] | None) -> ApiError:
    """An error of routing (404, 405) in the same form as all others."""
    error = ApiError(message, headers=headers)
    error.status = status
    error.type = "invalid_request_error" if status < 500 else "server_error"
    return error


def from_validation(error: ValidationError) -> InvalidRequest:
    """The first thing that is wrong with a request: the field, what is allowed, and what was sent."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return InvalidRequest(f"the request's body is not valid JSON: {first['ctx']['error']}")
    param = _path(first["loc"])
    return InvalidRequest(_explain(param, first), param=param)


def _explain(param: str | None, first: ErrorDetails) -> str:
    if first["type"] == "missing":
        return f"{param}: this field is required"
    where = f"{param}: " if param else ""
    return f"{where}{first['msg'].removeprefix('Value error, ')}; got {_shorten(repr(first['input']))}"


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"


def _path(location: tuple[int | str, ...]) -> str | None:
    """`("messages", 0, "content")` as `messages[0].content`."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.removeprefix(".") or None
