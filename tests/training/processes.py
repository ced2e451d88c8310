"""Real processes that share a gloo group, started once for many tests: torch takes seconds to load."""

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# (number of processes, function, its arguments), or None for the end.
Task = tuple[int, Callable[..., Any], tuple[Any, ...]] | None


class Processes:
    """A few processes, of which the first so many can be told to do something together."""

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections

    def run(self, number: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(group, *arguments)` returns in each of `number` processes, by rank."""
        self.tell((number, function, arguments))
        return [connection.recv() for connection in self._connections][:number]

    def tell(self, task: Task) -> None:
        for connection in self._connections:
            connection.send(task)


@contextmanager
def started(number: int) -> Iterator[Processes]:
    context = multiprocessing.get_context("forkserver")
    # The last is what torch loads when an optimizer is first made.
    context.set_forkserver_preload(["perigee.training.distributed", "torch._dynamo"])
    with tempfile.TemporaryDirectory() as directory:
        pipes = [context.Pipe() for _ in range(number)]
        members = [
            context.Process(target=_serve, args=(rank, number, Path(directory) / "store", pipes[rank][1]))
            for rank in range(number)
        ]
        for member in members:
            member.start()
        for _, theirs in pipes:
            theirs.close()  # so that a process which dies is an end of file here, and no wait for ever
        processes = Processes([ours for ours, _ in pipes])
        yield processes
        processes.tell(None)
        for member in members:
            member.join()


def _serve(rank: int, number: int, store: Path, connection: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), number), rank=rank, world_size=number)
    while task := connection.recv():
        size, function, arguments = task
        group = dist.new_group(list(range(size)))
        connection.send(function(group, *arguments) if rank < size else None)
    dist.destroy_process_group()
