"""Blocks read straight out of a peer's memory by the Mooncake Transfer Engine: over RDMA where there is some, or TCP.

The engine moves bytes and knows nothing of blocks. So a pull still asks the peer's `TransferServer`, over its
authenticated connection, which leases the blocks and says where they lie; the engine reads them; and only when the peer
has confirmed, over that connection, that its leases held until then, are the checksums looked at. A reader that was cut
off for being slow gets no confirmation, so it never takes what may lie in a reused slot for what it asked for.
"""

import ctypes
import importlib
import socket
from collections.abc import AsyncGenerator, Sequence
from types import ModuleType
from typing import Literal

from xxhash import xxh3_64_intdigest

from perigee.kvstore.blocks import HEADER_BYTES
from perigee.kvstore.errors import MalformedFrame
from perigee.kvstore.transfer import frames
from perigee.kvstore.transfer.base import BackendMissing, Received, TransferFailed, Wanted
from perigee.kvstore.transfer.frames import Ask, Kind, Reply
from perigee.kvstore.transfer.receiving import Deliver, ask, claim, judge, receive_reply, receive_text
from perigee.kvstore.transfer.tcp import TcpTransfer

_INSTALL = "install perigee[mooncake], and the system's libibverbs1, libcurl4 and libnuma1"

# Each part of a read over the engine's TCP has a connection of its own, and some of thousands at a time fail.
_PARTS_PER_CALL = 256


class MooncakeEngine:
    """The engine of this process, with `memory` registered: the `Segment` that peers read, and what reads theirs.

    `host` is where peers reach it, `device` the RDMA device to use. The engine asks nobody who he is: whoever reaches
    its ports can read and write this memory, so they must be on a network for the cluster's hosts alone.
    Raises BackendMissing if the engine is not installed, does not load or does not start.
    """

    def __init__(
        self, host: str, memory: memoryview, *, protocol: Literal["tcp", "rdma"] = "tcp", device: str = ""
    ) -> None:
        self._engine = _module().TransferEngine()
        if self._engine.initialize(host, "P2PHANDSHAKE", protocol, device):
            raise BackendMissing(f"mooncake: the engine does not start on {host!r} with {protocol} {device}".rstrip())
        self._name = f"{host}:{self._engine.get_rpc_port()}"
        self._memory_at = self.address(memory)
        if self._engine.register_memory(self._memory_at, len(memory)):
            raise BackendMissing(f"mooncake: the engine refuses {len(memory)} bytes of memory")

    @property
    def name(self) -> str:
        """What peers open this memory by."""
        return self._name

    def address(self, payload: memoryview) -> int:
        """Where a part of the memory lies."""
        return ctypes.addressof(ctypes.c_char.from_buffer(payload))

    def read(self, segment: str, parts: Sequence[tuple[memoryview, int]]) -> None:
        """Fills each slot from its address in a peer's segment; blocking. Raises TransferFailed."""
        for start in range(0, len(parts), _PARTS_PER_CALL):
            self._read(segment, parts[start : start + _PARTS_PER_CALL])

    def _read(self, segment: str, parts: Sequence[tuple[memoryview, int]]) -> None:
        into = [self.address(slot) for slot, _ in parts]
        sizes = [len(slot) for slot, _ in parts]
        code = self._engine.batch_transfer_sync_read(segment, into, [address for _, address in parts], sizes)
        if code:
            raise TransferFailed(f"mooncake: reading {len(parts)} blocks from {segment!r} failed with {code}")

    def close(self) -> None:
        """Takes the memory back. To be called once nothing reads any more."""
        self._engine.unregister_memory(self._memory_at)


class MooncakeTransfer:
    """A `Transfer` whose payloads the engine reads. Slots must lie in the engine's registered memory.

    A read that the engine has begun can't be broken off: a pull that is closed ends once the engine returns.
    """

    def __init__(self, engine: MooncakeEngine, secret: bytes = b"") -> None:
        self._engine = engine
        self._control = TcpTransfer(secret, exchange=self._exchange)

    @property
    def corrupt_received_total(self) -> int:
        return self._control.corrupt_received_total

    def pull(self, peer: str, wanted: Sequence[Wanted], wait_s: float) -> AsyncGenerator[Received, None]:
        """See `Transfer`. Raises PeerRefused if the peer serves no engine."""
        return self._control.pull(peer, wanted, wait_s)

    async def close(self) -> None:
        """Ends all links. The engine stays open."""
        await self._control.close()

    def _exchange(self, link: socket.socket, wanted: Sequence[Wanted], wait_s: float, deliver: Deliver) -> None:
        """See `tcp.Exchange`."""
        ask(link, Ask.LOCATE, wanted, wait_s)
        segment = receive_text(link, _expect(link, Kind.SEGMENT))
        outstanding = dict(enumerate(wanted))
        while located := _receive_located(link, outstanding):
            self._engine.read(segment, [(block.into, reply.address) for reply, block in located])
            link.sendall(frames.pack_request(Ask.DONE))
            _expect(link, Kind.HELD)
            deliver([judge(reply, block, xxh3_64_intdigest(block.into[HEADER_BYTES:])) for reply, block in located])


def _receive_located(link: socket.socket, outstanding: dict[int, Wanted]) -> list[tuple[Reply, Wanted]]:
    """The blocks that can be read now; none at the end."""
    located = []
    while (reply := receive_reply(link)).kind not in (Kind.SYNC, Kind.END):
        located.append((reply, claim(reply, Kind.LOCATED, outstanding)))
    return located


def _expect(link: socket.socket, kind: Kind) -> Reply:
    reply = receive_reply(link)
    if reply.kind != kind:
        raise MalformedFrame(f"reply: {reply.kind.name}; expected is {kind.name}")
    return reply


def _module() -> ModuleType:
    try:
        return importlib.import_module("mooncake.engine")
    except ImportError as error:
        raise BackendMissing(f"mooncake: {error}; {_INSTALL}") from error
