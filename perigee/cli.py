"""The `perigee` command. What a command needs is imported when it is called: a server never loads torch."""

import argparse
import asyncio
import gc
import inspect
import logging
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from pydantic import BaseModel

from perigee import lifeline
from perigee.configuration import ConfigurationError, FlagParser, add_flags, load

logger = logging.getLogger(__name__)

_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Command:
    """A command. The objects that it is made of are named as `module:attribute`."""

    name: str
    summary: str
    config: str
    run: str
    errors: tuple[str, ...] = ()  # what `run` raises for the user to read, rather than for us to debug
    positional: tuple[str, ...] = ()
    serves: bool = True  # until told to stop, which is then no failure
    supervises: bool = False  # `run` also takes the flags that its processes get
    drains: bool = False  # told to stop it first ends what it has begun, unless it is told again

    @property
    def section(self) -> str:
        """Of perigee.yaml."""
        return self.name.replace(" ", "-")


COMMANDS = (
    Command(
        "up",
        "a whole cluster on this machine, each part of it a process",
        "perigee.up:UpConfig",
        "perigee.up:run",
        supervises=True,
    ),
    Command(
        "server",
        "the HTTP front end",
        "perigee.server.config:ServerConfig",
        "perigee.server.app:run",
        errors=("perigee.workers.model.errors:ModelError", "perigee.server.tenants:KeysFileError", "builtins:OSError"),
    ),
    Command(
        "conductor",
        "the scheduler, with the directory of the cluster's members",
        "perigee.scheduler.config:ConductorConfig",
        "perigee.scheduler.service:run",
        errors=("perigee.scheduler.errors:SchedulerError",),
    ),
    Command(
        "store",
        "a store node, which keeps the KVCache blocks of one host",
        "perigee.kvstore.config:StoreConfig",
        "perigee.kvstore.node:run",
        errors=("perigee.kvstore.errors:StoreError",),
    ),
    Command(
        "worker",
        "a prefill, decode or mixed worker",
        "perigee.workers.config:WorkerConfig",
        "perigee.workers.service:run",
        errors=("perigee.workers.model.errors:ModelError", "perigee.kvstore.errors:StoreError"),
        drains=True,
    ),
    Command(
        "replay",
        "an open-loop load test of a live endpoint from a request trace",
        "perigee.replay.config:ReplayConfig",
        "perigee.replay.live:run",
        errors=("perigee.replay.errors:ReplayError",),
        positional=("trace",),
        serves=False,
    ),
    Command(
        "simulate",
        "the same on a simulated cluster, in virtual time, with the same scheduler and report",
        "perigee.replay.simulator.command:SimulateConfig",
        "perigee.replay.simulator.command:run",
        errors=("perigee.replay.errors:ReplayError", "perigee.scheduler.errors:SchedulerError"),
        positional=("trace",),
        serves=False,
    ),
    Command(
        "profile",
        "measures a cluster's workers and fits the Conductor's cost model",
        "perigee.profiling.config:ProfileConfig",
        "perigee.profiling.command:run",
        errors=("perigee.profiling.errors:ProfilingError", "perigee.scheduler.errors:SchedulerError"),
        serves=False,
    ),
    Command(
        "replay-log",
        "a recorded Conductor lived through again, to see whether it says the same",
        "perigee.replay.relive_command:ReplayLogConfig",
        "perigee.replay.relive_command:run",
        errors=("perigee.replay.errors:ReplayError", "perigee.scheduler.errors:SchedulerError"),
        positional=("recording",),
        serves=False,
    ),
    Command(
        "paper",
        "the Mooncake paper's experiments on simulated clusters, ours beside the published figures",
        "perigee.replay.paper.command:PaperConfig",
        "perigee.replay.paper.command:run",
        errors=("perigee.replay.errors:ReplayError", "perigee.scheduler.errors:SchedulerError"),
        serves=False,
    ),
    Command(
        "train",
        "the built-in model of Moonlight's architecture, with Muon",
        "perigee.training.config:TrainConfig",
        "perigee.training.command:run",
        errors=("perigee.training.errors:TrainingError", "builtins:OSError"),
        serves=False,
    ),
    Command(
        "bench conductor",
        "how fast the scheduler decides in a large cluster, and the memory that it takes to know one",
        "perigee.bench.conductor:ConductorBenchConfig",
        "perigee.bench.conductor:run",
        errors=("perigee.bench.errors:BenchError",),
        serves=False,
    ),
    Command(
        "bench engine",
        "the engine's speed beside the machine's limit and other engines'",
        "perigee.bench.engine:EngineBenchConfig",
        "perigee.bench.engine:run",
        errors=("perigee.workers.model.errors:ModelError", "perigee.bench.errors:BenchError"),
        serves=False,
    ),
    Command(
        "bench eviction",
        "the hit ratio of each eviction policy on a request trace, beside the best possible",
        "perigee.bench.eviction:EvictionBenchConfig",
        "perigee.bench.eviction:run",
        errors=("perigee.replay.errors:TraceError", "perigee.bench.errors:BenchError"),
        positional=("trace",),
        serves=False,
    ),
    Command(
        "bench fidelity",
        "the simulator beside a cluster that runs here, on the same requests",
        "perigee.bench.fidelity:FidelityBenchConfig",
        "perigee.bench.fidelity:run",
        errors=(
            "perigee.bench.errors:BenchError",
            "perigee.replay.errors:ReplayError",
            "perigee.profiling.errors:ProfilingError",
            "perigee.scheduler.errors:SchedulerError",
        ),
        positional=("trace",),
        serves=False,
    ),
    Command(
        "bench moba",
        "prefill with block-sparse attention beside full attention",
        "perigee.bench.moba:MobaBenchConfig",
        "perigee.bench.moba:run",
        errors=("perigee.workers.model.errors:ModelError", "perigee.bench.errors:BenchError"),
        serves=False,
    ),
    Command(
        "bench recall",
        "whether a model finds a stated pass key again, with full attention and with MoBA",
        "perigee.bench.recall:RecallBenchConfig",
        "perigee.bench.recall:run",
        errors=(
            "perigee.workers.model.errors:ModelError",
            "perigee.bench.errors:BenchError",
            "perigee.training.errors:TrainingError",
        ),
        serves=False,
    ),
    Command(
        "bench store",
        "how fast blocks move, beside what the machine can do at the most",
        "perigee.bench.store:StoreBenchConfig",
        "perigee.bench.store:run",
        errors=("perigee.kvstore.errors:StoreError",),
        serves=False,
    ),
)


def main() -> int:
    """Runs the command that the arguments name and returns the exit code: 2 if they are wrong."""
    arguments = sys.argv[1:]
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            sys.stdout.write(_overview(COMMANDS))
            return 0
        if arguments[0] == "bench" and arguments[1:2] in ([], ["-h"], ["--help"]):
            sys.stdout.write(_overview([command for command in COMMANDS if command.name.startswith("bench ")]))
            return 0
        return _run(*_find(arguments))
    except ConfigurationError as error:
        for problem in error.problems:
            sys.stderr.write(f"perigee: {problem}\n")
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        # What is left goes with the process. To look for garbage in it first takes most of a second after torch.
        gc.freeze()


def _overview(commands: Sequence[Command]) -> str:
    width = max(len(command.name) for command in commands)
    listing = "\n".join(f"  {command.name:{width}}  {command.summary}" for command in commands)
    return f"usage: perigee COMMAND [FLAGS]\n\n{listing}\n\n`perigee COMMAND --help` tells all about a command.\n"


def _find(arguments: Sequence[str]) -> tuple[Command, Sequence[str]]:
    """The command that `arguments` begin with, and those that are its own."""
    for command in COMMANDS:
        words = command.name.split()
        if list(arguments[: len(words)]) == words:
            return command, arguments[len(words) :]
    allowed = ", ".join(command.name for command in COMMANDS)
    raise ConfigurationError([f"{' '.join(arguments[:2])!r}: no such command; allowed are {allowed}"])


def _run(command: Command, arguments: Sequence[str]) -> int:
    config_type: type[BaseModel] = pkgutil.resolve_name(command.config)
    program = f"perigee {command.name}"
    usage = " ".join([program, *(name.upper() for name in command.positional), "[FLAGS]"])
    parser = FlagParser(program, usage, description=config_type.__doc__, allow_abbrev=False)
    add_flags(parser, config_type, command.positional)
    _add_process_flags(parser)
    flags = vars(parser.parse_args(arguments))
    config = load(
        config_type,
        command=command.section,
        file=flags["config"],
        sections=[each.section for each in COMMANDS],
        environ=os.environ,
        flags=flags,
        positional=command.positional,
    )
    _start_logging(getattr(config, "id", command.name), flags["log_level"])
    if flags["lifeline"] is not None:
        lifeline.hold(flags["lifeline"], flags["run_directory"])
    return _call(command, config, _inherited(flags))


def _add_process_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings file [default: perigee.yaml, if any]")
    parser.add_argument("--log-level", choices=_LEVELS, default="info", help="[default: info]")
    # Of the children of `up`: see lifeline.py.
    parser.add_argument("--lifeline", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--run-directory", type=Path, help=argparse.SUPPRESS)


def _inherited(flags: dict[str, Any]) -> list[str]:
    """The process flags that a supervisor passes on."""
    config = [f"--config={flags['config']}"] if flags["config"] else []
    return [*config, f"--log-level={flags['log_level']}"]


def _start_logging(name: str, level: str) -> None:
    """One line an event on standard error, with the name of the process, for several may share it."""
    form = f"%(asctime)s.%(msecs)03dZ %(levelname)s [{name}] %(name)s: %(message)s"
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(format=form, datefmt="%Y-%m-%dT%H:%M:%S", level=logging.WARNING)
    logging.getLogger("perigee").setLevel(level.upper())


def _call(command: Command, config: BaseModel, inherited: Sequence[str]) -> int:
    """Runs the command to its end. What it raises ends here: in a line if it is for the user, else with its trace."""
    run = pkgutil.resolve_name(command.run)
    expected = tuple(pkgutil.resolve_name(error) for error in command.errors)
    arguments = (config, inherited) if command.supervises else (config,)
    try:
        if inspect.iscoroutinefunction(run):
            return uvloop.run(_until_signal(run(*arguments), command))
        return run(*arguments) or 0
    except (ConfigurationError, KeyboardInterrupt):
        raise
    except expected as error:
        sys.stderr.write(f"perigee {command.name}: {error}\n")
    except Exception:
        logger.exception("%s failed", command.name)
    return 1


async def _until_signal(work: Awaitable[int | None], command: Command) -> int:
    """Awaits `work`, which SIGTERM and SIGINT cancel, once, so that it cleans up; twice if it drains. The result is the
    exit code.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    received: list[int] = []

    def stop(number: int) -> None:
        if len(received) <= command.drains and task is not None:
            task.cancel()
        received.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    try:
        return await work or 0
    except asyncio.CancelledError:
        if not received:
            raise
        return 0 if command.serves else 128 + received[0]
