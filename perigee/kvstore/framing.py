"""Frames on the local socket: each message is preceded by its length in bytes as a little-endian u32."""

import struct
from collections.abc import Iterator

from perigee.kvstore.errors import MalformedFrame

# More than a hundred thousand keys. Nothing legitimate comes near; what claims more is no message of ours.
MAX_FRAME_BYTES = 4 << 20
PREFIX_BYTES = 4
_PREFIX = struct.Struct("<I")


def frame(body: bytes) -> bytes:
    """`body` with its length before it."""
    return _PREFIX.pack(len(body)) + body


def body_bytes(prefix: bytes | bytearray) -> int:
    """The length that starts a frame. Raises MalformedFrame if it is 0 or above `MAX_FRAME_BYTES`."""
    (length,) = _PREFIX.unpack_from(prefix)
    if not 0 < length <= MAX_FRAME_BYTES:
        raise MalformedFrame(f"frame of {length} bytes; allowed are 1 to {MAX_FRAME_BYTES}")
    return int(length)


class FrameReader:
    """Cuts a stream of bytes into the bodies of its frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies that `data` completes. Raises MalformedFrame, after which the stream is unreadable."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= PREFIX_BYTES:
                body = start + PREFIX_BYTES
                end = body + body_bytes(self._buffer[start:body])
                if end > len(self._buffer):
                    break
                start = end
                yield bytes(self._buffer[body:end])
        finally:
            del self._buffer[:start]
