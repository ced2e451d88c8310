"""The wire format between store nodes: what goes before, between and after the payloads. All integers little-endian.

    pulling node                              serving node
    Hello(nonce)                        ──▶
                                        ◀──   GREETING: nonce, proof          or REFUSED: why
    proof                               ──▶
                                        ◀──   ACCEPTED                        or REFUSED: why
    Request(PULL, keys, wait)           ──▶
                                        ◀──   BLOCK, payload · BLOCK, payload · … · END
    Request(LOCATE, keys, wait)         ──▶
                                        ◀──   SEGMENT: name · LOCATED · … · SYNC
    Request(DONE)                       ──▶
                                        ◀──   HELD · LOCATED · … · SYNC · … · END

Each side proves with an HMAC over both nonces that it knows the shared secret. The stream itself is neither encrypted
nor signed: it belongs on a network that only the cluster's hosts can write to.
"""

import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from perigee.kvstore.blocks import KEY_BYTES, BlockKey
from perigee.kvstore.errors import MalformedFrame

VERSION = 1
NONCE_BYTES = PROOF_BYTES = 32
MAX_KEYS = 65_536
MAX_TEXT_BYTES = 1024
MAX_WAIT_MS = 2**32 - 1

_MAGIC = b"PRGT"
_HELLO = struct.Struct(f"<4sH2x{NONCE_BYTES}s")
_REQUEST = struct.Struct("<B3xII")
_REPLY = struct.Struct("<BB2xIIIQQ")
HELLO_BYTES, REQUEST_BYTES, REPLY_BYTES = _HELLO.size, _REQUEST.size, _REPLY.size

Side = Literal["pulling", "serving"]


def proof(secret: bytes, side: Side, pulling_nonce: bytes, serving_nonce: bytes) -> bytes:
    """What `side` shows to prove that it knows `secret`. The side is part of it, so none can send back the other's."""
    return hmac.digest(secret, b"perigee transfer " + side.encode() + pulling_nonce + serving_nonce, "sha256")


def pack_hello(nonce: bytes) -> bytes:
    return _HELLO.pack(_MAGIC, VERSION, nonce)


def unpack_hello(data: bytes) -> bytes:
    """The nonce. Raises MalformedFrame if these bytes begin no conversation of this version."""
    magic: bytes
    nonce: bytes
    magic, version, nonce = _HELLO.unpack(data)
    if magic != _MAGIC:
        raise MalformedFrame(f"magic: {magic!r}; allowed is {_MAGIC!r}")
    if version != VERSION:
        raise MalformedFrame(f"protocol version: {version}; allowed is {VERSION}")
    return nonce


class Ask(IntEnum):
    """What a pulling node says."""

    PULL = 1  # send me these blocks
    LOCATE = 2  # tell me where these blocks are, and hold them while I read
    DONE = 3  # I have read all that was located so far


@dataclass(frozen=True, slots=True)
class RequestHead:
    """The fixed part of a request, which `num_keys` keys follow."""

    ask: Ask
    num_keys: int
    wait_ms: int

    @classmethod
    def unpack(cls, data: bytes) -> "RequestHead":
        """Raises MalformedFrame for what is no request."""
        number, num_keys, wait_ms = _REQUEST.unpack(data)
        try:
            ask = Ask(number)
        except ValueError as error:
            raise MalformedFrame(f"request: {number}; allowed are {Ask.PULL} to {Ask.DONE}") from error
        if num_keys > MAX_KEYS or (ask == Ask.DONE) != (num_keys == 0):
            raise MalformedFrame(f"keys: {num_keys} with {ask.name}; allowed are 1 to {MAX_KEYS}, and none with DONE")
        return cls(ask, num_keys, wait_ms)


def pack_request(ask: Ask, keys: Sequence[BlockKey] = (), wait_ms: int = 0) -> bytes:
    return _REQUEST.pack(ask, len(keys), wait_ms) + b"".join(keys)


def unpack_keys(data: bytes) -> list[BlockKey]:
    """Raises MalformedFrame if a key is there twice."""
    keys = [BlockKey(data[start : start + KEY_BYTES]) for start in range(0, len(data), KEY_BYTES)]
    if len(set(keys)) != len(keys):
        raise MalformedFrame("keys: one is there twice")
    return keys


class Kind(IntEnum):
    """What a serving node says."""

    GREETING = 1  # `size_bytes` of nonce and proof follow
    ACCEPTED = 2
    REFUSED = 3  # `size_bytes` of text follow, and then the end of the stream
    BLOCK = 4  # `size_bytes` of payload follow
    SEGMENT = 5  # `size_bytes` of text follow: what the memory of this node is called by who reads it directly
    LOCATED = 6  # the payload lies at `address`, for as long as this connection lives and until DONE is sent
    SYNC = 7  # send DONE once all that was located has been read
    HELD = 8  # all that was located before DONE stood still until DONE came
    END = 9  # the request is answered; what did not come is missing


@dataclass(frozen=True, slots=True)
class Reply:
    """The fixed part of a reply. `index` is a key's in the request; fields that a kind does not use are 0."""

    kind: Kind
    index: int = 0
    num_tokens: int = 0
    origin: int = 0
    size_bytes: int = 0
    address: int = 0

    def pack(self) -> bytes:
        return _REPLY.pack(self.kind, self.origin, self.index, self.num_tokens, 0, self.size_bytes, self.address)

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> "Reply":
        """Raises MalformedFrame for what is no reply."""
        number, origin, index, num_tokens, _, size_bytes, address = _REPLY.unpack(data)
        try:
            kind = Kind(number)
        except ValueError as error:
            raise MalformedFrame(f"reply of kind {number}; allowed are {Kind.GREETING} to {Kind.END}") from error
        return cls(kind, index, num_tokens, origin, size_bytes, address)


def pack_text(kind: Literal[Kind.REFUSED, Kind.SEGMENT], text: str) -> bytes:
    """A reply with its text, of which no more than `MAX_TEXT_BYTES` are sent."""
    encoded = text.encode()[:MAX_TEXT_BYTES]
    return Reply(kind, size_bytes=len(encoded)).pack() + encoded


def check_text_bytes(reply: Reply) -> int:
    """The length of the text after `reply`. Raises MalformedFrame if it is too long."""
    if reply.size_bytes > MAX_TEXT_BYTES:
        raise MalformedFrame(f"text of {reply.size_bytes} bytes; allowed are {MAX_TEXT_BYTES}")
    return reply.size_bytes
