"""Builds a cluster, lets a trace arrive at it, and says what came of that."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.evict import make_policy
from perigee.kvstore.limits import StoreLimits
from perigee.kvstore.store import Store
from perigee.replay.keys import ROOT, PromptKeys
from perigee.replay.metrics import RequestRecord, Slo
from perigee.replay.series import Sample
from perigee.replay.shadow_report import Judged, SecondChecks, ShadowReport, compare
from perigee.replay.simulator.clock import Clock
from perigee.replay.simulator.cluster import Cluster, NodeGroup
from perigee.replay.simulator.control import Control
from perigee.replay.simulator.disk import Disk, records_per_segment, ssd_tier
from perigee.replay.simulator.front import Ask, FrontEnd
from perigee.replay.simulator.machine import Machine, NodeSize, machine_of, size_of
from perigee.replay.simulator.network import Link, Network, Nic
from perigee.replay.simulator.node import Node
from perigee.replay.simulator.sampler import Sampler
from perigee.replay.simulator.worker import Habits, Worker
from perigee.replay.trace import TraceRequest
from perigee.scheduler.conductor import Conductor
from perigee.scheduler.policies import PolicyNames, make_policies, parse_policies
from perigee.scheduler.shadow import Shadow
from perigee.scheduler.slo import Slo as Promise
from perigee.workers.engine.batcher import Batcher, BatchLimits
from perigee.workers.engine.pages import PagePool
from perigee.workers.messages import ModelCard


@dataclass(frozen=True, slots=True)
class Simulated:
    """What came of each request, in order of their ends, samples of every second, and what the cluster's shadow would
    have done, if it has one.
    """

    records: tuple[RequestRecord, ...]
    samples: tuple[Sample, ...]
    shadow: ShadowReport | None = None


class Simulation:
    """A cluster at rest until `run`, which tells `on_record` of the end of each request.

    Raises ClusterError or InvalidProfile if it cannot be built.
    """

    def __init__(self, cluster: Cluster, on_record: Callable[[RequestRecord], None] | None = None) -> None:
        self.cluster = cluster
        self._on_record = on_record
        self.clock = Clock()
        self.records: list[RequestRecord] = []
        machine = machine_of(cluster)
        policies = make_policies(cluster.placement, cluster.admission, cluster.balance, cluster.role_hold_s)
        self._judged: list[Judged] = []
        conductor = Conductor(policies, machine.profile, self._shadow())
        self.control = Control(self.clock, conductor, _card(cluster), cluster.report_s)
        self.front = FrontEnd(self.clock, self.control, cluster.block_tokens, self._ended)
        self.sampler = Sampler(self.clock, self.control, self.front, Slo(cluster.slo_ttft_s, cluster.slo_tbt_s))
        self._network = Network(machine.profile.transfer_fixed_s, machine.layers if cluster.layerwise else 1)
        self._num_left = 0
        for group in cluster.nodes:
            size = size_of(group, cluster, machine)
            for _ in range(group.count):
                self._add_workers(group, size, machine, self._add_node(size))

    def run(self, trace: Sequence[TraceRequest]) -> Simulated:
        """Everything that happens, from the first arrival to the last end. Raises TraceError."""
        keys = PromptKeys(self.cluster.block_tokens)
        self._num_left = len(trace)
        self.control.open()
        self.sampler.open()
        for index, request in enumerate(trace):
            self.clock.at(request.arrival_s, self.front.arrive, _ask(self.cluster, index, request, keys.of(request)))
        self.clock.run()
        return Simulated(tuple(self.records), tuple(self.sampler.samples), self._shadow_report())

    def _ended(self, record: RequestRecord) -> None:
        self.records.append(record)
        self.sampler.count(record)
        if self._on_record:
            self._on_record(record)
        self._num_left -= 1
        if not self._num_left:
            self.control.close()
            self.sampler.close()

    def _shadow_report(self) -> ShadowReport | None:
        shadow = self.control.conductor.shadow
        if shadow is None:
            return None
        acting = PolicyNames(self.cluster.placement, self.cluster.admission)
        return compare(acting, shadow.policies.names, self._judged, SecondChecks.of(shadow.tally))

    # ---- building --------------------------------------------------------------------------------------------------

    def _shadow(self) -> Shadow | None:
        if self.cluster.shadow is None:
            return None
        names = parse_policies(self.cluster.shadow)
        policies = make_policies(names.placement, names.admission)
        return Shadow(policies, lambda ours, theirs: self._judged.append((ours, theirs)))

    def _add_node(self, size: NodeSize) -> Node:
        cluster, nodes = self.cluster, self.control.nodes
        name = f"store-{len(nodes)}"
        tier = ssd_tier(size.ssd_slots, cluster.block_tokens) if size.ssd_slots else None
        store = Store(
            size.num_slots,
            cluster.block_tokens,
            make_policy(cluster.eviction, size.num_slots),
            StoreLimits.of(size.num_slots),
            tier,
        )
        disk = self._disk(size) if size.ssd_slots else None
        node = Node(name, self.clock, store, self._network, disk, lambda: self.control.blocks_changed(name))
        self._network.nics[name] = Nic.of(size.nic_tokens_per_s)
        nodes[name] = node
        node.peers = nodes
        return node

    def _disk(self, size: NodeSize) -> Disk:
        reads, writes = Link(size.ssd_read_tokens_per_s), Link(size.ssd_write_tokens_per_s)
        block_tokens = self.cluster.block_tokens
        return Disk(self.clock, records_per_segment(size.ssd_slots), reads, writes, block_tokens)

    def _add_workers(self, group: NodeGroup, size: NodeSize, machine: Machine, node: Node) -> None:
        cluster, workers = self.cluster, self.control.workers
        habits = Habits(
            machine.profile,
            machine.layers,
            cluster.layerwise,
            cluster.prefix_cache != "none",
            cluster.save_outputs,
            cluster.store_wait_s,
        )
        for role in group.roles:
            name = f"{role}-{sum(worker.name.startswith(role) for worker in workers.values())}"
            batched = group.chunk_tokens if cluster.chunked_prefill else cluster.max_context
            limits = BatchLimits(batched, group.max_sequences, cluster.max_context, role != "decode")
            batcher = Batcher(PagePool(size.num_pages, cluster.block_tokens), limits, frozenset())
            workers[name] = Worker(
                name,
                role,
                self.clock,
                node,
                batcher,
                habits,
                group.pipeline_stages,
                self.front,
                self.control.worker_changed,
            )


def simulate(trace: Sequence[TraceRequest], cluster: Cluster) -> Simulated:
    """What comes of a trace on a cluster. Raises ReplayError or InvalidProfile."""
    return Simulation(cluster).run(trace)


def _card(cluster: Cluster) -> ModelCard:
    name = cluster.model or str(cluster.profile)
    return ModelCard(name, "", "", "", "", cluster.block_tokens, cluster.max_context, 2, ROOT)


def _ask(cluster: Cluster, index: int, request: TraceRequest, keys: tuple[BlockKey, ...]) -> Ask:
    priority, slo = _class_of(cluster, index)
    max_tokens = cluster.max_tokens or request.output_tokens
    return Ask(
        f"request-{index}",
        request.arrival_s,
        request.input_tokens,
        keys,
        min(request.output_tokens, max_tokens),
        max_tokens,
        priority,
        slo=slo,
    )


def _class_of(cluster: Cluster, index: int) -> tuple[int, Promise]:
    """Drawn by lot, the same for the same seed and place in the trace."""
    lot = _uniform(cluster.seed, index)
    for each in cluster.classes:
        if lot < each.share:
            return each.priority, _promise(each.slo_ttft_s, each.slo_tbt_s)
        lot -= each.share
    return 0, _promise(cluster.slo_ttft_s, cluster.slo_tbt_s)


def _promise(ttft_s: float | None, tbt_s: float | None) -> Promise:
    return Promise(ttft_s or math.inf, tbt_s or math.inf)


def _uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that is a pure function of its arguments."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
