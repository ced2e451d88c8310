"""How the processes of a cluster know each other: one shared secret, asked for on every gRPC call between them.

What is shown is not the secret but a token derived from it, so who listens in learns no more than how to make such
calls. Links are not encrypted: that is the network's to do, where it is not private.
"""

import hashlib
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

_log = logging.getLogger(__name__)

_METADATA_KEY = "perigee-token"
_TOKEN_PURPOSE = b"perigee control 1"

Options = Sequence[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class Access:
    """The secrets of one process, empty where there is none. Without a cluster secret nobody is asked."""

    cluster_secret: bytes = field(default=b"", repr=False)
    directory_password: str = field(default="", repr=False)

    @property
    def token(self) -> str:
        """What a caller shows and is compared with."""
        return hmac.digest(self.cluster_secret, _TOKEN_PURPOSE, hashlib.sha256).hex()

    def channel(self, target: str, options: Options = ()) -> grpc.aio.Channel:
        """A channel whose calls show that they come from this cluster."""
        interceptors = _showing(self.token) if self.cluster_secret else None
        return grpc.aio.insecure_channel(target, options=list(options), interceptors=interceptors)

    def server(self, options: Options = ()) -> grpc.aio.Server:
        """A server that answers only calls from this cluster: others get UNAUTHENTICATED."""
        interceptors = [_Asking(self.token)] if self.cluster_secret else None
        return grpc.aio.server(options=list(options), interceptors=interceptors)


OPEN = Access()
"""Nobody is asked: for what only this machine can reach."""


class _Asking(grpc.aio.ServerInterceptor):
    def __init__(self, token: str) -> None:
        self._token = token.encode()

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        shown = [value for key, value in details.invocation_metadata or () if key == _METADATA_KEY]
        if len(shown) == 1 and hmac.compare_digest(_as_bytes(shown[0]), self._token):
            return await continuation(details)
        _log.warning("call refused method=%s: another cluster secret, or none", details.method)
        # Of all kinds of handlers this one reads nothing of what is sent.
        return grpc.stream_stream_rpc_method_handler(_refuse)


async def _refuse(requests: AsyncIterator[Any], context: "grpc.aio.ServicerContext[Any, Any]") -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the caller has another cluster secret, or none")


def _as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


class _Showing:
    """Adds the token to a call. gRPC looks at an interceptor's class, and takes one kind of call from each object."""

    def __init__(self, token: str) -> None:
        self._token = token

    def _shown(self, details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
        metadata = grpc.aio.Metadata(*(details.metadata or ()), (_METADATA_KEY, self._token))
        return grpc.aio.ClientCallDetails(
            details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
        )


class _ShowingUnary(_Showing, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self, continuation: Callable[..., Awaitable[Any]], details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(self._shown(details), request)


class _ShowingUnaryStream(_Showing, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(
        self, continuation: Callable[..., Awaitable[Any]], details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(self._shown(details), request)


class _ShowingStream(_Showing, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(
        self, continuation: Callable[..., Awaitable[Any]], details: grpc.aio.ClientCallDetails, requests: Any
    ) -> Any:
        return await continuation(self._shown(details), requests)


def _showing(token: str) -> list[grpc.aio.ClientInterceptor]:
    return [_ShowingUnary(token), _ShowingUnaryStream(token), _ShowingStream(token)]
