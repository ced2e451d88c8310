"""The node's door for the workers of its host: a Unix socket over which they get the arena."""

import asyncio
import contextlib
import functools
import logging
import os
import socket
import weakref
from pathlib import Path

from google.protobuf.message import DecodeError

from perigee.kvstore import sockets
from perigee.kvstore import store_pb2 as pb
from perigee.kvstore.accepting import accept
from perigee.kvstore.dram import Mapping
from perigee.kvstore.driver import Driver
from perigee.kvstore.errors import InvalidRequest, StoreError
from perigee.kvstore.framing import frame
from perigee.kvstore.opening import StoreHost
from perigee.kvstore.session import Session
from perigee.kvstore.wire import refused_to_pb

_log = logging.getLogger(__name__)

_HELLO_TIMEOUT_S = 10.0


class LocalServer:
    """Admits workers to the node. The first one decides what a slot is, and so opens the store.

    Listens from the start; those who connect before `serve` wait. Owns the listening socket, its path and the sessions.
    """

    def __init__(self, node_id: str, incarnation: str, path: Path, mapping: Mapping, host: StoreHost) -> None:
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._node_id = node_id
        self._incarnation = incarnation
        self._mapping = mapping
        self._host = host
        self._path = path
        self._listener = sockets.listen(path)
        self._inode = path.stat().st_ino

    async def serve(self) -> None:
        """Serves until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                raw, _ = await accept(self._listener, self._node_id)
                tasks.create_task(self._welcome(raw)).add_done_callback(functools.partial(_close_if_cancelled, raw))

    def close(self) -> None:
        """Ends all connections and removes the socket, unless its path is somebody else's by now."""
        for session in self._sessions:
            session.abort()
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
            driver = await self._answer(raw, hello)
            await loop.connect_accepted_socket(lambda: self._session(driver, hello.hello.worker_id), raw)
        except (OSError, EOFError, DecodeError, StoreError) as error:
            _log.warning("worker refused node=%s pid=%d uid=%d error=%s", self._node_id, pid, uid, error)
            raw.close()

    def _session(self, driver: Driver, worker_id: str) -> Session:
        session = Session(self._node_id, driver, worker_id)
        self._sessions.add(session)
        return session

    async def _answer(self, raw: socket.socket, request: pb.LocalRequest) -> Driver:
        """Sends the welcome and the arena's descriptor, or says why not and raises that InvalidRequest."""
        reply = pb.LocalReply(request=request.request)
        try:
            driver = await self._admit(request)
        except InvalidRequest as error:
            reply.refused.CopyFrom(refused_to_pb(error))
            raw.send(frame(reply.SerializeToString()))
            raise
        arena = driver.arena
        welcome = pb.Welcome(
            node_id=self._node_id,
            incarnation=self._incarnation,
            slot_bytes=arena.slot_bytes,
            num_slots=arena.num_slots,
        )
        reply.welcome.CopyFrom(welcome)
        sockets.send_frame_with_descriptor(raw, reply.SerializeToString(), self._mapping.fd)
        return driver

    async def _admit(self, request: pb.LocalRequest) -> Driver:
        """Raises InvalidRequest for a worker whose blocks are not those that are kept here."""
        if request.WhichOneof("op") != "hello":
            raise InvalidRequest("the first message must be hello")
        return await self._host.open_for(request.hello.payload_bytes, request.hello.block_tokens)


def _close_if_cancelled(raw: socket.socket, welcoming: "asyncio.Task[None]") -> None:
    """Also where it was cancelled before it began."""
    if welcoming.cancelled():
        raw.close()
