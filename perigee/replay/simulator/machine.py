"""A cluster's figures in the simulator's units: blocks, pages, and tokens of KVCache a second."""

import math
from dataclasses import dataclass, replace

from perigee.replay.errors import ClusterError
from perigee.replay.simulator.cluster import Cluster, NodeGroup
from perigee.scheduler.cost import CostProfile
from perigee.scheduler.cost.hardware import HARDWARE
from perigee.scheduler.cost.model_shape import MODELS
from perigee.scheduler.cost.profile_file import read_profile
from perigee.scheduler.cost.roofline import kv_capacity_tokens, roofline

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Machine:
    """A worker's speed. `kv_tokens` is what its memory holds, 0 where only the groups say it; so is `kv_bytes`."""

    profile: CostProfile
    layers: int
    kv_bytes: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class NodeSize:
    """One node of a group, pipelined ones taken together."""

    num_slots: int
    ssd_slots: int
    num_pages: int
    nic_tokens_per_s: float
    ssd_read_tokens_per_s: float
    ssd_write_tokens_per_s: float


def machine_of(cluster: Cluster) -> Machine:
    """Raises ClusterError if a model's weights do not fit, InvalidProfile if there is no such profile."""
    if cluster.profile is not None:
        kv_bytes = cluster.kv_bytes_per_token or 0
        return Machine(_on_network(read_profile(cluster.profile).profile, cluster, kv_bytes), 1, kv_bytes, 0)
    assert cluster.model is not None and cluster.hardware is not None
    shape, hardware = MODELS[cluster.model], HARDWARE[cluster.hardware]
    if cluster.devices is not None:
        hardware = hardware.with_devices(cluster.devices)
    kv_tokens = kv_capacity_tokens(shape, hardware)
    if not kv_tokens:
        raise ClusterError(f"devices: {cluster.model} does not fit into {hardware.devices} of {cluster.hardware}")
    profile = _on_network(roofline(shape, hardware), cluster, shape.kv_bytes_per_token)
    if cluster.prefix_cache == "local":
        profile = replace(profile, load_token_s=0.0)  # the prefix lies in the pages already
    return Machine(profile, shape.num_layers, shape.kv_bytes_per_token, kv_tokens)


def size_of(group: NodeGroup, cluster: Cluster, machine: Machine) -> NodeSize:
    """Raises ClusterError if nothing fits."""
    size, stages = cluster.block_tokens, group.pipeline_stages
    tokens = group.capacity_tokens or _tokens(group.dram_gib or 0.0, machine)
    nic_gbps = group.nic_gbps or cluster.nic_gbps
    nic = nic_gbps * 1e9 / 8 / machine.kv_bytes if nic_gbps else 1 / (machine.profile.transfer_token_s or math.inf)
    per_gb = 1e9 / machine.kv_bytes if group.ssd_gib else math.inf
    return NodeSize(
        num_slots=_blocks("memory", tokens * stages, size),
        ssd_slots=_blocks("SSD", _tokens(group.ssd_gib, machine) * stages, size) if group.ssd_gib else 0,
        num_pages=_blocks("pages", (group.kv_tokens or machine.kv_tokens) * stages, size),
        nic_tokens_per_s=(nic or math.inf) * stages,
        ssd_read_tokens_per_s=group.ssd_read_gb_per_s * per_gb * stages,
        ssd_write_tokens_per_s=group.ssd_write_gb_per_s * per_gb * stages,
    )


def _on_network(profile: CostProfile, cluster: Cluster, kv_bytes: int) -> CostProfile:
    """With the cluster's own bandwidth, if it names one."""
    if cluster.nic_gbps is None:
        return profile
    return replace(profile, transfer_token_s=kv_bytes * 8 / (cluster.nic_gbps * 1e9))


def _blocks(what: str, tokens: int, size: int) -> int:
    if tokens < size:
        raise ClusterError(f"nodes: {tokens} tokens of {what} hold no block of {size}")
    return tokens // size


def _tokens(gib: float, machine: Machine) -> int:
    return int(gib * _GIB / machine.kv_bytes)
