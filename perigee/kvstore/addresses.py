"""Which addresses a process may listen on."""

import ipaddress
from typing import Annotated

from pydantic import AfterValidator

_ALLOWED = (
    "allowed are unix:/path and host:port on loopback, such as 127.0.0.1:0: links between hosts need authentication,"
    " which does not exist yet"
)


def checked_listen(address: str) -> str:
    """`address` itself, a gRPC bind target that only this machine can reach. Raises ValueError for any other."""
    if address.startswith("unix:/"):
        return address
    host, _, port = address.rpartition(":")
    if not _is_loopback(host) or not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ValueError(_ALLOWED)
    return address


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


Listen = Annotated[str, AfterValidator(checked_listen)]
"""The type of a configuration's `listen`. Nothing that listens there asks who is calling."""
