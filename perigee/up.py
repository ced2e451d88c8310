"""`perigee up`: a whole cluster on this machine, each part of it a process."""

import asyncio
import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
from pydantic import BaseModel, ByteSize, Field, SecretStr, ValidationError

from perigee.configuration import ConfigurationError, as_flags, explained
from perigee.kvstore.addresses import ClusterProcess
from perigee.kvstore.blocks import DTYPE_BYTES, DType
from perigee.kvstore.config import StoreConfig, TransferName
from perigee.output import check_writable
from perigee.scheduler.config import AdmissionName, BalanceName, ConductorConfig, PlacementName, Shadow, TenantWeights
from perigee.scheduler.cost.hardware import cpu
from perigee.scheduler.cost.model_shape import ModelShape
from perigee.scheduler.cost.profile_file import Origin, ProfileFile, read_profile, write_profile
from perigee.scheduler.cost.roofline import roofline
from perigee.scheduler.errors import InvalidProfile
from perigee.scheduler.scheduler_pb2 import ClusterRequest
from perigee.scheduler.scheduler_pb2_grpc import ConductorStub
from perigee.scheduler.slo import parse_classes
from perigee.server.config import ServerConfig
from perigee.server.tenants import KeysFileError, Tenants
from perigee.supervisor import Children, ChildSpec, run_directory
from perigee.workers.config import BlockTokens, MobaText, Role, WorkerConfig
from perigee.workers.model.checkpoint import DEFAULT_MODEL, resolve
from perigee.workers.model.errors import CheckpointError

logger = logging.getLogger(__name__)

_POLL_S = 0.05


# What is passed on to the other processes has their defaults.
_WORKER = WorkerConfig.model_fields
_SCHEDULER = ConductorConfig.model_fields
_SERVER = ServerConfig.model_fields


class UpConfig(ClusterProcess, frozen=True, extra="forbid"):
    """A cluster on this machine: server, Conductor, store nodes with prefill and decode workers around each."""

    host: str = Field("127.0.0.1", min_length=1, description="address that the API listens on")
    port: int = Field(8000, ge=0, le=65535, description="port that the API listens on; 0: any free one")
    api_keys_file: Path | None = Field(None, description="file of `name:key` lines; needed beyond loopback")
    model: str = Field(
        DEFAULT_MODEL,
        min_length=1,
        description="a directory in Hugging Face layout, a .gguf file, a Hugging Face name or a built-in one",
    )
    served_model_name: str | None = Field(None, description="what the API calls it, if not by the name it came with")
    nodes: int = Field(1, ge=1, description="number of store nodes; between them blocks go over TCP, as between hosts")
    transfer: TransferName = Field("tcp", description="what moves blocks between the store nodes")
    prefill: int = Field(1, ge=1, description="number of prefill workers of each store node")
    decode: int = Field(1, ge=1, description="number of decode workers of each store node")
    dtype: DType = Field("bfloat16", description="of weights and KVCache; outputs are exact in float32")
    moba: MobaText = Field(_WORKER["moba"].default, description=_WORKER["moba"].description)
    block_tokens: BlockTokens = Field(_WORKER["block_tokens"].default, description=_WORKER["block_tokens"].description)
    dram_bytes: ByteSize = Field(
        ByteSize(1 << 30), gt=0, description="memory that each store node keeps blocks in, such as 512MiB or 2GiB"
    )
    ssd_folder: Path | None = Field(
        None, description="folder for blocks that leave memory, kept for the next start; none: no SSD tier"
    )
    ssd_bytes: ByteSize = Field(
        ByteSize(4 << 30), gt=0, description="disk that each store node reserves there, such as 16GiB"
    )
    kv_tokens: int = Field(_WORKER["kv_tokens"].default, ge=1, description="tokens that each worker's KV pool holds")
    max_batched_tokens: int = Field(
        _WORKER["max_batched_tokens"].default, ge=1, description="tokens that a worker computes in one step at most"
    )
    shared_prompt_tokens: int = Field(
        _WORKER["shared_prompt_tokens"].default, ge=1, description=_WORKER["shared_prompt_tokens"].description
    )
    max_sequences: int = Field(
        _WORKER["max_sequences"].default, ge=1, description="sequences that a worker holds at once at most"
    )
    max_context: int = Field(
        _WORKER["max_context"].default, ge=0, description="positions a sequence may have; 0: as many as the model has"
    )
    profile: Path | None = Field(
        None, description="cost model, as `perigee profile` writes it; without it: a rough one of the model's shape"
    )
    placement: PlacementName = Field(_SCHEDULER["placement"].default, description=_SCHEDULER["placement"].description)
    admission: AdmissionName = Field(_SCHEDULER["admission"].default, description=_SCHEDULER["admission"].description)
    balance: BalanceName = Field(_SCHEDULER["balance"].default, description=_SCHEDULER["balance"].description)
    role_hold_s: float = Field(
        _SCHEDULER["role_hold_s"].default, gt=0, description=_SCHEDULER["role_hold_s"].description
    )
    slo_classes: tuple[str, ...] = Field(_SERVER["slo_classes"].default, description=_SERVER["slo_classes"].description)
    default_slo_class: str = Field(
        _SERVER["default_slo_class"].default, description=_SERVER["default_slo_class"].description
    )
    tenant_weights: TenantWeights = Field(
        _SCHEDULER["tenant_weights"].default, description=_SCHEDULER["tenant_weights"].description
    )
    shadow: Shadow | None = Field(None, description=_SCHEDULER["shadow"].description)
    receipts_file: Path | None = Field(None, description=_SCHEDULER["receipts_file"].description)
    record: Path | None = Field(None, description=_SCHEDULER["record"].description)
    threads: int = Field(0, ge=0, description="CPU threads of each worker; 0: one a core")
    grace_s: float = Field(10.0, gt=0, description="how long the processes may take to end, in seconds")

    @property
    def model_name(self) -> str:
        """What the API calls the model."""
        return self.served_model_name or Path(self.model).name.removesuffix(".gguf")

    @property
    def worker_threads(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))


async def run(config: UpConfig, process_flags: Sequence[str]) -> int:
    """Runs the cluster until cancelled, or until one of its processes ends: then the exit code is 1.

    `process_flags` go to each process besides its configuration. Raises ConfigurationError for a port that is taken, a
    model that is not there, or a file that cannot be used, before anything is started.
    """
    port = _free_port(config.host, config.port)
    model = await _resolve(config)
    _make_folders(config)
    config, environment = _with_secret(config)
    with run_directory() as directory:
        config = _with_profile(config, model, directory)
        specs = _checked(plan(config, port, model, directory, process_flags))
        _check_files(config)
        async with Children(directory, config.grace_s, environment) as children:
            for spec in specs:
                await children.start(spec)
            ready = asyncio.create_task(_announce(config, port, conductor_target(directory)))
            try:
                death = await children.first_death()
            finally:
                ready.cancel()
            logger.error("ending the cluster because %s", death)
    return 1


def plan(
    config: UpConfig, port: int, model: Path, directory: Path, process_flags: Sequence[str]
) -> Iterator[ChildSpec]:
    """The processes of the cluster, each after those that it needs. `directory` is for their sockets."""
    conductor = conductor_target(directory)
    stores = [_store(config, directory, index) for index in range(config.nodes)]
    server = ServerConfig(
        host=config.host,
        port=port,
        api_keys_file=config.api_keys_file,
        conductor=conductor,
        model=str(model),
        dtype=config.dtype,
        served_model_name=config.model_name,
        slo_classes=config.slo_classes,
        default_slo_class=config.default_slo_class,
    )
    scheduler = ConductorConfig(
        listen=conductor,
        profile=config.profile,
        placement=config.placement,
        admission=config.admission,
        balance=config.balance,
        role_hold_s=config.role_hold_s,
        tenant_weights=config.tenant_weights,
        shadow=config.shadow,
        receipts_file=config.receipts_file,
        record=config.record,
    )
    yield _child("conductor", 0, "conductor", scheduler, process_flags)
    for store in stores:
        yield _child(store.id, 1, "store", store, process_flags)
    for worker in _workers(config, model, directory, stores):
        yield _child(worker.id, 2, "worker", worker, process_flags, _openmp(worker.threads))
    yield _child("server", 3, "server", server, process_flags)


def conductor_target(directory: Path) -> str:
    """Where the Conductor of a cluster with this run directory is reached."""
    return f"unix:{directory}/conductor.sock"


def _store(config: UpConfig, directory: Path, index: int) -> StoreConfig:
    name = f"store-{index}"
    return StoreConfig(
        id=name,
        listen=f"unix:{directory}/{name}.grpc.sock",
        socket=directory / f"{name}.sock",
        directory=conductor_target(directory),
        cluster_secret=config.cluster_secret,
        transfer=config.transfer,
        dram_bytes=config.dram_bytes,
        ssd_folder=config.ssd_folder / name if config.ssd_folder else None,
        ssd_bytes=config.ssd_bytes,
    )


def _with_secret(config: UpConfig) -> tuple[UpConfig, dict[str, str]]:
    """Several nodes reach each other over TCP, as others on this machine could: they get a secret if they have none.

    Returns what the environment of all processes must say of it, which inherit one that was given.
    """
    if config.cluster_secret or config.nodes == 1:
        return config, {}
    secret = secrets.token_hex(32)
    return config.model_copy(update={"cluster_secret": SecretStr(secret)}), {"PERIGEE_CLUSTER_SECRET": secret}


def _with_profile(config: UpConfig, model: Path, directory: Path) -> UpConfig:
    """With the cost model that the Conductor begins with: a roofline, unless there is a measured one.

    Raises ConfigurationError for a profile that cannot be read, and a model that has no roofline.
    """
    try:
        if config.profile is not None:
            read_profile(config.profile)
            return config
        shape = ModelShape.from_config(json.loads((model / "config.json").read_text()), DTYPE_BYTES[config.dtype])
        origin = Origin(method="roofline", model=config.model_name, machine=f"{config.worker_threads} CPU threads")
        path = directory / "profile.yaml"
        write_profile(path, ProfileFile.of(roofline(shape, cpu(config.worker_threads)), origin))
        return config.model_copy(update={"profile": path})
    except InvalidProfile as error:
        raise ConfigurationError([f"--{'model' if config.profile is None else 'profile'}: {error}"]) from error


def _make_folders(config: UpConfig) -> None:
    """Raises ConfigurationError if the stores cannot have their folders."""
    try:
        for index in range(config.nodes if config.ssd_folder else 0):
            assert config.ssd_folder is not None
            (config.ssd_folder / f"store-{index}").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError([f"--ssd-folder: {config.ssd_folder}: {error.strerror}"]) from error


def _check_files(config: UpConfig) -> None:
    """Raises ConfigurationError for API keys that cannot be read, and for files that could not be written."""
    try:
        Tenants.load(config.api_keys_file, parse_classes(config.slo_classes))
    except KeysFileError as error:
        raise ConfigurationError([f"--api-keys-file: {str(error).removeprefix('api_keys_file: ')}"]) from error
    check_writable(record=config.record, receipts_file=config.receipts_file)


def _workers(config: UpConfig, model: Path, directory: Path, stores: Sequence[StoreConfig]) -> Iterator[WorkerConfig]:
    """The first ones of each role are those of the first node."""
    roles: list[tuple[Role, int]] = [("prefill", config.prefill), ("decode", config.decode)]
    for role, count in roles:
        for index, store in enumerate(store for store in stores for _ in range(count)):
            yield WorkerConfig(
                id=f"{role}-{index}",
                role=role,
                model=str(model),
                served_model_name=config.model_name,
                listen=f"unix:{directory}/{role}-{index}.sock",
                store=store.socket,
                store_id=store.id,
                directory=store.directory,
                dtype=config.dtype,
                moba=config.moba,
                block_tokens=config.block_tokens,
                kv_tokens=config.kv_tokens,
                max_batched_tokens=config.max_batched_tokens,
                shared_prompt_tokens=config.shared_prompt_tokens,
                max_sequences=config.max_sequences,
                max_context=config.max_context,
                threads=config.worker_threads,
            )


def _openmp(threads: int) -> dict[str, str]:
    """Workers share the cores: a thread that has nothing to do must leave its core to another worker's."""
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}


def _child(
    name: str,
    tier: int,
    command: str,
    config: BaseModel,
    process_flags: Sequence[str],
    environment: dict[str, str] | None = None,
) -> ChildSpec:
    return ChildSpec(name, tier, [command, *as_flags(config), *process_flags], environment or {})


def _checked(specs: Iterator[ChildSpec]) -> list[ChildSpec]:
    """Raises ConfigurationError for what suits us, but not the process that it is meant for."""
    try:
        return list(specs)
    except ValidationError as error:
        raise explained(error, UpConfig, {}) from error


def _free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises ConfigurationError if it cannot be listened on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except socket.gaierror as error:
        raise ConfigurationError(
            [f"--host: {host!r}: {error.strerror}; allowed is an address of this machine"]
        ) from error
    except OSError as error:
        reason = (
            "is taken by another process" if error.errno == errno.EADDRINUSE else f"{os.strerror(error.errno or 0)}"
        )
        raise ConfigurationError(
            [f"--port: {port} on {host} {reason}; allowed are free ports, or 0 for any"]
        ) from error


async def _resolve(config: UpConfig) -> Path:
    try:
        return await asyncio.to_thread(resolve, config.model, config.dtype)
    except CheckpointError as error:
        raise ConfigurationError([f"--model: {str(error).removeprefix('model: ')}"]) from error


async def _announce(config: UpConfig, port: int, conductor: str) -> None:
    """Says on standard output that the API answers and that all workers are there, as soon as that is so."""
    host, num_workers = config.host, config.nodes * (config.prefill + config.decode)
    # Of other processes there is no event to await.
    while not await _is_healthy(host, port):  # noqa: ASYNC110
        await asyncio.sleep(_POLL_S)
    async with config.access.channel(conductor) as channel:
        while await _count_workers(channel) < num_workers:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
    sys.stdout.write(f"ready: http://{f'[{host}]' if ':' in host else host}:{port}\n")
    sys.stdout.flush()


async def _is_healthy(host: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(b"GET /health HTTP/1.0\r\n\r\n")
            return (await reader.readline()).split()[1:2] == [b"200"]
        finally:
            writer.close()
    return False


async def _count_workers(channel: grpc.aio.Channel) -> int:
    """How many workers have reported to the Conductor; 0 if it does not answer."""
    try:
        state = await ConductorStub(channel).Cluster(ClusterRequest())
    except grpc.aio.AioRpcError:
        return 0
    return sum(worker.HasField("report") for worker in state.workers)
