"""The node's door for the workers of its host: a Unix socket over which they get the arena."""

import asyncio
import contextlib
import logging
import os
import socket
from pathlib import Path

from google.protobuf.message import DecodeError

from perigee.kvstore import sockets
from perigee.kvstore import store_pb2 as pb
from perigee.kvstore.blocks import ALIGNMENT
from perigee.kvstore.dram import Arena, Mapping
from perigee.kvstore.errors import InvalidRequest, StoreError
from perigee.kvstore.evict import LRU
from perigee.kvstore.feed import Feed
from perigee.kvstore.framing import frame
from perigee.kvstore.session import Sessions
from perigee.kvstore.store import Store
from perigee.kvstore.wire import refused_to_pb

_log = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 10.0
_ACCEPT_RETRY_S = 0.1


class LocalServer:
    """Admits workers to the node. The first one decides what a slot is, and so opens the store.

    Listens from the start; those who connect before `serve` wait. Owns the listening socket, its path and `sessions`.
    """

    def __init__(self, node_id: str, incarnation: str, path: Path, mapping: Mapping, feed: Feed) -> None:
        self.sessions: Sessions | None = None
        self._node_id = node_id
        self._incarnation = incarnation
        self._mapping = mapping
        self._feed = feed
        self._path = path
        self._listener = sockets.listen(path)
        self._inode = path.stat().st_ino

    async def serve(self) -> None:
        """Serves until cancelled."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    raw, _ = await loop.sock_accept(self._listener)
                except OSError as error:  # out of descriptors: whoever connects has to wait for some
                    _log.warning("cannot accept node=%s error=%s", self._node_id, error)
                    await asyncio.sleep(_ACCEPT_RETRY_S)
                else:
                    tasks.create_task(self._welcome(raw))

    def close(self) -> None:
        """Ends all connections and removes the socket, unless its path is somebody else's by now."""
        if self.sessions:
            self.sessions.close()
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()

    async def _welcome(self, raw: socket.socket) -> None:
        """Turns a socket into a session, or closes it."""
        pid, uid = sockets.peer(raw)
        loop = asyncio.get_running_loop()
        try:
            if uid != os.geteuid():
                raise InvalidRequest(f"user {uid} is not the user of this node")
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                hello = pb.LocalRequest.FromString(await sockets.receive_frame(raw))
            sessions = self._answer(raw, hello)
            await loop.connect_accepted_socket(lambda: sessions.new(hello.hello.worker_id), raw)
        except (OSError, EOFError, DecodeError, StoreError) as error:
            _log.warning("worker refused node=%s pid=%d uid=%d error=%s", self._node_id, pid, uid, error)
            raw.close()
        except asyncio.CancelledError:
            raw.close()
            raise

    def _answer(self, raw: socket.socket, request: pb.LocalRequest) -> Sessions:
        """Sends the welcome and the arena's descriptor, or says why not and raises that InvalidRequest."""
        reply = pb.LocalReply(request=request.request)
        try:
            sessions = self._admit(request)
        except InvalidRequest as error:
            reply.refused.CopyFrom(refused_to_pb(error))
            raw.send(frame(reply.SerializeToString()))
            raise
        arena = sessions.store.arena
        welcome = pb.Welcome(
            node_id=self._node_id,
            incarnation=self._incarnation,
            slot_bytes=arena.slot_bytes,
            num_slots=arena.num_slots,
        )
        reply.welcome.CopyFrom(welcome)
        sockets.send_frame_with_descriptor(raw, reply.SerializeToString(), self._mapping.fd)
        return sessions

    def _admit(self, request: pb.LocalRequest) -> Sessions:
        """Raises InvalidRequest for a worker whose blocks are not those that are kept here."""
        if request.WhichOneof("op") != "hello":
            raise InvalidRequest("the first message must be hello")
        if self.sessions is None:
            self.sessions = Sessions(self._node_id, self._open(request.hello), self._feed)
            self._feed.resize(self.sessions.store.arena.num_slots)
        store = self.sessions.store
        _check_equal("payload_bytes", request.hello.payload_bytes, store.arena.slot_bytes)
        _check_equal("block_tokens", request.hello.block_tokens, store.block_tokens)
        return self.sessions

    def _open(self, hello: pb.Hello) -> Store:
        if hello.payload_bytes <= 0 or hello.payload_bytes % ALIGNMENT:
            raise InvalidRequest(f"payload_bytes: {hello.payload_bytes}; allowed are positive multiples of {ALIGNMENT}")
        if hello.block_tokens <= 0:
            raise InvalidRequest(f"block_tokens: {hello.block_tokens}; allowed is anything above 0")
        arena = Arena(self._mapping, hello.payload_bytes)
        if arena.num_slots == 0:
            dram_bytes = self._mapping.size_bytes
            raise InvalidRequest(f"dram_bytes: the node's {dram_bytes} hold no payload of {hello.payload_bytes} bytes")
        _log.info("store opened node=%s slots=%d slot_bytes=%d", self._node_id, arena.num_slots, arena.slot_bytes)
        return Store(arena, hello.block_tokens, LRU())


def _check_equal(field: str, theirs: int, ours: int) -> None:
    if theirs != ours:
        raise InvalidRequest(f"{field}: {theirs} is not the {ours} that the first worker of this node fixed")
