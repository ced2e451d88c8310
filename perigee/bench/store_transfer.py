"""How fast blocks move between two processes over loopback: our pull, a bare socket, the Mooncake Transfer Engine."""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from perigee.bench.store_transfer_peer import block_key
from perigee.kvstore.dram import Mapping, allocate
from perigee.kvstore.transfer.base import Wanted
from perigee.kvstore.transfer.mooncake import MooncakeEngine
from perigee.kvstore.transfer.tcp import TcpTransfer

_TOTAL_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Rates:
    """GB/s of each way to move blocks. `mooncake` is None where that is not installed."""

    pull: float
    bare_socket: float
    mooncake: float | None


def measure_pull(block_bytes: int, *, rounds: int = 7, total_bytes: int = _TOTAL_BYTES) -> Rates:
    """Moves `total_bytes`, in blocks of `block_bytes`, from another process in each way; the best of `rounds` counts.

    `pull` is ours, with every checksum verified; `bare_socket` is a loop of `recv_into` that asks and checks nothing;
    `mooncake` is one batch read by the engine alone. They take turns: the speed of a shared machine comes and goes.
    """
    size_bytes = total_bytes // block_bytes * block_bytes
    mapping = Mapping(allocate(size_bytes), size_bytes)
    mapping.populate()
    memory = mapping.view(0, size_bytes)
    slots = [mapping.view(start, block_bytes) for start in range(0, size_bytes, block_bytes)]
    with contextlib.ExitStack() as closing:
        closing.callback(mapping.close)
        places = closing.enter_context(_peer(block_bytes, len(slots)))
        ways = {
            "pull": closing.enter_context(_pull(places["address"], slots)),
            "bare_socket": closing.enter_context(_bare(places["bare"], slots)),
        }
        if "segment" in places:
            ways["mooncake"] = closing.enter_context(_mooncake(places, memory, slots))
        best_s = {name: _elapsed_s(way) for name, way in ways.items()}
        for _ in range(rounds):
            best_s = {name: min(best_s[name], _elapsed_s(way)) for name, way in ways.items()}
    rates = {name: size_bytes / seconds / 1e9 for name, seconds in best_s.items()}
    return Rates(rates["pull"], rates["bare_socket"], rates.get("mooncake"))


@contextlib.contextmanager
def _peer(block_bytes: int, num_blocks: int) -> Iterator[dict[str, Any]]:
    """Where everything of the other process is. It ends when its standard input does."""
    command = [sys.executable, "-m", "perigee.bench.store_transfer_peer", str(block_bytes), str(num_blocks)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield json.loads(process.stdout.readline())
        process.communicate("")


@contextlib.contextmanager
def _pull(address: str, slots: Sequence[memoryview]) -> Iterator[Callable[[], None]]:
    wanted = [Wanted(index, block_key(index), slot) for index, slot in enumerate(slots)]
    with asyncio.Runner() as runner:
        transfer = runner.run(_new_transfer())

        async def pull() -> None:
            received = [block async for block in transfer.pull(address, wanted, wait_s=0.0)]
            assert len(received) == len(wanted), "a block is missing or was corrupted"

        try:
            yield lambda: runner.run(pull())
        finally:
            runner.run(transfer.close())


async def _new_transfer() -> TcpTransfer:
    return TcpTransfer()


@contextlib.contextmanager
def _bare(port: int, slots: Sequence[memoryview]) -> Iterator[Callable[[], None]]:
    with socket.create_connection(("127.0.0.1", port)) as connection:

        def receive() -> None:
            connection.sendall(b"\0")
            for slot in slots:
                received = 0
                while received < len(slot):
                    received += connection.recv_into(slot[received:])

        yield receive


@contextlib.contextmanager
def _mooncake(places: dict[str, Any], memory: memoryview, slots: Sequence[memoryview]) -> Iterator[Callable[[], None]]:
    engine = MooncakeEngine("127.0.0.1", memory)
    parts = [(slot, places["memory"] + index * len(slot)) for index, slot in enumerate(slots)]
    try:
        yield lambda: engine.read(places["segment"], parts)
    finally:
        engine.close()


def _elapsed_s(way: Callable[[], None]) -> float:
    started = time.perf_counter()
    way()
    return time.perf_counter() - started
