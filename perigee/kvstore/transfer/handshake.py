"""How two store nodes make sure of each other before anything else is said: both sides of `frames`' beginning."""

import asyncio
import hmac
import secrets
import socket

from perigee.kvstore.errors import MalformedFrame
from perigee.kvstore.transfer import frames
from perigee.kvstore.transfer.base import PeerRefused
from perigee.kvstore.transfer.frames import Kind, Reply

# A peer that vanished without a word, as hosts do, is noticed after some eleven seconds of silence.
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


def tune(connection: socket.socket) -> None:
    """Options that both sides' connections have. The buffers stay the kernel's to size."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for level, option, value in _KEEPALIVE:
        connection.setsockopt(level, option, value)


async def greet(connection: socket.socket, secret: bytes) -> None:
    """The pulling side. Raises PeerRefused if one of the two does not accept the other, OSError, EOFError."""
    loop = asyncio.get_running_loop()
    nonce = secrets.token_bytes(frames.NONCE_BYTES)
    await loop.sock_sendall(connection, frames.pack_hello(nonce))
    await _expect(connection, Kind.GREETING)
    theirs = await receive_exactly(connection, frames.NONCE_BYTES)
    proof = await receive_exactly(connection, frames.PROOF_BYTES)
    if not hmac.compare_digest(proof, frames.proof(secret, "serving", nonce, theirs)):
        raise PeerRefused("the peer does not know the shared secret of this node")
    await loop.sock_sendall(connection, frames.proof(secret, "pulling", nonce, theirs))
    await _expect(connection, Kind.ACCEPTED)


async def admit(connection: socket.socket, secret: bytes) -> None:
    """The serving side. Raises MalformedFrame or PeerRefused, having told the peer why, or OSError, EOFError."""
    loop = asyncio.get_running_loop()
    try:
        theirs = frames.unpack_hello(await receive_exactly(connection, frames.HELLO_BYTES))
        nonce = secrets.token_bytes(frames.NONCE_BYTES)
        answer = nonce + frames.proof(secret, "serving", theirs, nonce)
        await loop.sock_sendall(connection, Reply(Kind.GREETING, size_bytes=len(answer)).pack() + answer)
        proof = await receive_exactly(connection, frames.PROOF_BYTES)
        if not hmac.compare_digest(proof, frames.proof(secret, "pulling", theirs, nonce)):
            raise PeerRefused("the shared secret is not this node's")
    except (MalformedFrame, PeerRefused) as error:
        await refuse(connection, str(error))
        raise
    await loop.sock_sendall(connection, Reply(Kind.ACCEPTED).pack())


async def refuse(connection: socket.socket, why: str) -> None:
    """Tells the peer why, before the connection is closed."""
    await asyncio.get_running_loop().sock_sendall(connection, frames.pack_text(Kind.REFUSED, why))


async def receive_exactly(connection: socket.socket, size_bytes: int) -> bytes:
    """Raises EOFError if the stream ends before."""
    loop = asyncio.get_running_loop()
    data = bytearray(size_bytes)
    view, received = memoryview(data), 0
    while received < size_bytes:
        got = await loop.sock_recv_into(connection, view[received:])
        if not got:
            raise EOFError("the peer closed the connection")
        received += got
    return bytes(data)


async def _expect(connection: socket.socket, kind: Kind) -> None:
    reply = Reply.unpack(await receive_exactly(connection, frames.REPLY_BYTES))
    if reply.kind == Kind.REFUSED:
        text = await receive_exactly(connection, frames.check_text_bytes(reply))
        raise PeerRefused(f"the peer refused: {text.decode(errors='replace')}")
    if reply.kind != kind:
        raise MalformedFrame(f"reply: {reply.kind.name}; expected is {kind.name}")
