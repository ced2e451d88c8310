"""Receiving payloads from a peer straight into their slots: blocking code, for a thread of its own."""

import math
import select
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xxhash import xxh3_64

from perigee.kvstore.blocks import DECODE, HEADER_BYTES, PREFILL, PayloadHeader
from perigee.kvstore.errors import MalformedFrame
from perigee.kvstore.transfer import frames
from perigee.kvstore.transfer.base import PeerRefused, Received, Wanted
from perigee.kvstore.transfer.frames import Ask, Kind, Reply

# Little enough to be in the cache still when it is read for the checksum.
_CHUNK_BYTES = 512 << 10
_DELIVER_BYTES = 1 << 20
_MAX_TIMEOUT_S = 1e6  # the kernel's limit is above that


@dataclass(frozen=True, slots=True)
class Corrupt:
    """A block that came, but is not what its header and checksum say."""

    index: int


Outcome = Received | Corrupt
Deliver = Callable[[Sequence[Outcome]], None]


def receive_payloads(link: socket.socket, wanted: Sequence[Wanted], wait_s: float, deliver: Deliver) -> None:
    """Asks for blocks and delivers them as they come, until the peer says that this was all.

    Raises OSError or EOFError when the link breaks, MalformedFrame for what was not asked for, PeerRefused.
    """
    ask(link, Ask.PULL, wanted, wait_s)
    outstanding = dict(enumerate(wanted))
    deliveries = _Deliveries(link, deliver)
    try:
        while (reply := receive_reply(link)).kind != Kind.END:
            block = claim(reply, Kind.BLOCK, outstanding)
            deliveries.add(judge(reply, block, _receive_payload(link, block.into)), reply.size_bytes)
    finally:
        deliveries.flush()  # what came before a link broke did come


def wait_in_kernel(link: socket.socket, timeout_s: float) -> None:
    """Lets calls on `link` wait in the kernel until all is there, each for `timeout_s` seconds without a byte at most.

    A timeout of Python's own would cost two system calls for each time that some bytes have come.
    """
    timeout = struct.pack("@ll", *divmod(math.ceil(min(timeout_s, _MAX_TIMEOUT_S) * 1e6), 1_000_000))
    link.setblocking(True)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        link.setsockopt(socket.SOL_SOCKET, option, timeout)


class _Deliveries:
    """Delivers small blocks together while more of them are here already: each delivery wakes another thread."""

    def __init__(self, link: socket.socket, deliver: Deliver) -> None:
        self._deliver = deliver
        self._arrivals = select.poll()
        self._arrivals.register(link, select.POLLIN)
        self._held: list[Outcome] = []
        self._held_bytes = 0

    def add(self, outcome: Outcome, size_bytes: int) -> None:
        self._held.append(outcome)
        self._held_bytes += size_bytes
        if self._held_bytes >= _DELIVER_BYTES or not self._arrivals.poll(0):
            self.flush()

    def flush(self) -> None:
        self._deliver(self._held)
        self._held, self._held_bytes = [], 0


def ask(link: socket.socket, what: Ask, wanted: Sequence[Wanted], wait_s: float) -> None:
    wait_ms = min(max(0, math.ceil(wait_s * 1000)), frames.MAX_WAIT_MS)
    link.sendall(frames.pack_request(what, [block.key for block in wanted], wait_ms))


def receive_reply(link: socket.socket) -> Reply:
    """The next reply without what follows it. Raises PeerRefused if that is all there is to come."""
    reply = Reply.unpack(_receive_exactly(link, frames.REPLY_BYTES))
    if reply.kind == Kind.REFUSED:
        raise PeerRefused(f"the peer refused: {receive_text(link, reply)}")
    return reply


def receive_text(link: socket.socket, reply: Reply) -> str:
    return _receive_exactly(link, frames.check_text_bytes(reply)).decode(errors="replace")


def claim(reply: Reply, kind: Kind, outstanding: dict[int, Wanted]) -> Wanted:
    """The wanted block that `reply` is about, which is not outstanding any more."""
    if reply.kind != kind:
        raise MalformedFrame(f"reply: {reply.kind.name}; expected is {kind.name} or {Kind.END.name}")
    block = outstanding.pop(reply.index, None)
    if block is None:
        raise MalformedFrame(f"index: {reply.index} was not asked for, or came already")
    if reply.size_bytes != len(block.into):
        raise MalformedFrame(f"payload of {reply.size_bytes} bytes; allowed are the slot's {len(block.into)}")
    return block


def judge(reply: Reply, block: Wanted, checksum: int) -> Outcome:
    """Whether the payload in the slot, with this checksum, is what its own header and the peer say."""
    header = PayloadHeader(reply.num_tokens, reply.origin, checksum)
    if block.into[:HEADER_BYTES] != header.pack() or reply.origin not in (PREFILL, DECODE):
        return Corrupt(block.index)
    return Received(block.index, header.num_tokens, header.origin)


def _receive_payload(link: socket.socket, into: memoryview) -> int:
    """Fills `into`; the checksum of what follows the payload's header."""
    digest = xxh3_64()
    received = 0
    while received < len(into):
        got = _receive(link, into[received : received + _CHUNK_BYTES])
        digest.update(into[max(received, HEADER_BYTES) : received + got])
        received += got
    return digest.intdigest()


def _receive_exactly(link: socket.socket, size_bytes: int) -> bytearray:
    data = bytearray(size_bytes)
    received = 0
    while received < size_bytes:
        received += _receive(link, memoryview(data)[received:])
    return data


def _receive(link: socket.socket, into: memoryview) -> int:
    got = link.recv_into(into, 0, socket.MSG_WAITALL)
    if not got:
        raise EOFError("the peer closed the connection")
    return got
