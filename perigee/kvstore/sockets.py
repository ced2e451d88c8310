"""The local Unix socket below the messages: who may connect, and how the arena's descriptor travels."""

import asyncio
import os
import socket
import struct
from pathlib import Path

from perigee.kvstore.accepting import readable
from perigee.kvstore.errors import StoreError
from perigee.kvstore.framing import PREFIX_BYTES, body_bytes, frame

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def listen(path: Path) -> socket.socket:
    """A listening socket that only this user may connect to. Takes the place of one that nobody listens on any more.

    Raises StoreError if somebody does, or if `path` is something else.
    """
    _remove_dead(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The mode of the socket becomes that of its path, so there is no moment at which others could connect.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(path))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise StoreError(f"socket: cannot listen on {str(path)!r}: {error}") from error
    listener.setblocking(False)
    return listener


def peer(connection: socket.socket) -> tuple[int, int]:
    """Process id and user id of whoever connected."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return pid, uid


async def receive_frame(connection: socket.socket) -> bytes:
    """One frame's body and not a byte more. Raises EOFError when the stream ends, MalformedFrame for a bad length."""
    prefix = await _receive_exactly(connection, PREFIX_BYTES)
    return await _receive_exactly(connection, body_bytes(prefix))


def send_frame_with_descriptor(connection: socket.socket, body: bytes, fd: int) -> None:
    """To be sent before anything else, so that a small frame always fits the socket's buffer."""
    data = frame(body)
    if socket.send_fds(connection, [data], [fd]) != len(data):
        raise StoreError("the socket did not take a welcome at once")


async def receive_frame_with_descriptor(connection: socket.socket) -> tuple[bytes, int | None]:
    """The first frame of a connection, and the descriptor that came with it, if any did. The caller owns it."""
    await readable(connection)
    # Ancillary data is delivered with the first byte that it was sent with, whichever part of the frame we ask for.
    prefix, fds, _, _ = socket.recv_fds(connection, PREFIX_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    fd = fds[0] if fds else None
    try:
        if not prefix:
            raise EOFError("the other side closed the connection")
        prefix += await _receive_exactly(connection, PREFIX_BYTES - len(prefix))
        return await _receive_exactly(connection, body_bytes(prefix)), fd
    except BaseException:
        if fd is not None:
            os.close(fd)
        raise


def _remove_dead(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_socket():
        raise StoreError(f"socket: {str(path)!r} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        else:
            raise StoreError(f"socket: another process listens on {str(path)!r}")


async def _receive_exactly(connection: socket.socket, size_bytes: int) -> bytes:
    loop = asyncio.get_running_loop()
    received = bytearray()
    while len(received) < size_bytes:
        data = await loop.sock_recv(connection, size_bytes - len(received))
        if not data:
            raise EOFError("the other side closed the connection")
        received += data
    return bytes(received)
