"""Addresses that blocks are served on."""

import socket

from perigee.kvstore.addresses import is_loopback, without_brackets
from perigee.kvstore.errors import StoreError


def split(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`. Raises ValueError for anything else."""
    host, _, port = address.rpartition(":")
    host = without_brackets(host)
    if not host or not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ValueError(f"address: {address!r}; allowed is host:port, such as 127.0.0.1:7000")
    return host, int(port)


def listen(address: str, *, authenticated: bool) -> socket.socket:
    """A listening TCP socket for the event loop, on any free port where that is 0.

    Raises StoreError if that cannot be, or must not: where nobody is asked for a secret, only loopback is allowed.
    """
    try:
        host, port = split(address)
        if not (authenticated or is_loopback(host)):
            raise ValueError(f"{address!r} is not on loopback, which is allowed only with the cluster's secret")
        family, _, _, _, resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(resolved[:2], family=family, backlog=128)
    except (ValueError, OSError) as error:
        raise StoreError(f"transfer_listen: cannot listen on {address!r}: {error}") from error
    listener.setblocking(False)
    return listener
