"""What a simulated cluster is made of, as a YAML file says it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from perigee.kvstore.evict import PolicyName
from perigee.replay.errors import ClusterError
from perigee.scheduler.balance.roles import DEFAULT_HOLD_S
from perigee.scheduler.cost.hardware import HARDWARE
from perigee.scheduler.cost.model_shape import MODELS
from perigee.scheduler.policies import ADMISSIONS, BALANCES, PLACEMENTS, parse_policies

Role = Literal["prefill", "decode", "mixed"]
PrefixCache = Literal["global", "local", "none"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

# Placements and balances that move prefixes from node to node.
_FETCHING = ("perigee", "global-cache", "copies")


class NodeGroup(BaseModel, frozen=True, extra="forbid"):
    """`count` times the same: a store node, and a worker for each of `roles`.

    With `pipeline_stages` each is a group of so many nodes that share the layers: one worker, whose chunks go through
    them in a pipeline, and one store node with the memory and the NICs of all. Other figures are those of one node.
    """

    roles: tuple[Role, ...] = Field(min_length=1, description="a worker of each: prefill, decode or mixed")
    count: Count = Field(description="how many")
    pipeline_stages: Count = Field(default=1, description="nodes that compute a prompt's chunks in a pipeline")
    dram_gib: Positive | None = Field(default=None, description="memory for KVCache blocks")
    capacity_tokens: Count | None = Field(default=None, description="the same, in tokens")
    ssd_gib: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="SSD for KVCache blocks; 0: none")
    ssd_read_gb_per_s: Positive = Field(default=12.0, description="its bandwidth, in 10^9 bytes a second")
    ssd_write_gb_per_s: Positive = Field(default=6.0, description="and that of writing")
    nic_gbps: Positive | None = Field(default=None, description="bandwidth in each direction [default: the cluster's]")
    kv_tokens: Count | None = Field(default=None, description="a worker's pages [default: what its memory holds]")
    max_sequences: Count = Field(default=256, description="sequences that may hold a worker's pages at once")
    chunk_tokens: Count = Field(default=8192, description="tokens that a step may compute")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.dram_gib is None) == (self.capacity_tokens is None):
            raise ValueError("dram_gib, capacity_tokens: allowed is exactly one of the two")
        if self.pipeline_stages > 1 and self.roles != ("prefill",):
            raise ValueError(f"pipeline_stages: is {self.pipeline_stages}, allowed is 1 unless roles is [prefill]")
        return self


class RequestClass(BaseModel, frozen=True, extra="forbid"):
    """A share of the requests, drawn by the seed, that goes before others and has bounds of its own."""

    share: float = Field(gt=0, le=1, description="of all requests")
    priority: int = Field(description="higher goes first")
    slo_ttft_s: Positive | None = Field(default=None, description="longest time to first token")
    slo_tbt_s: Positive | None = Field(default=None, description="longest time between tokens")


class Cluster(BaseModel, frozen=True, extra="forbid"):
    """A cluster that serves one model: either `model` on `hardware`, or whatever `profile` was measured of."""

    name: str = Field(min_length=1, description="what reports call it")
    model: str | None = Field(default=None, description=f"one of {', '.join(MODELS)}")
    hardware: str | None = Field(default=None, description=f"one of {', '.join(HARDWARE)}")
    devices: Count | None = Field(default=None, description="GPUs of a worker [default: the hardware's]")
    profile: Path | None = Field(default=None, description="cost profile, beside this file unless absolute")
    kv_bytes_per_token: Count | None = Field(default=None, description="with a profile: what memory sizes stand for")
    nodes: tuple[NodeGroup, ...] = Field(min_length=1, description="groups of nodes")
    nic_gbps: Positive | None = Field(default=None, description="of a node [default: the hardware's]")
    block_tokens: Count = Field(default=512, description="tokens of a block, a divisor of the trace's blocks")
    max_context: Count = Field(default=262_144, description="tokens that prompt and answer may have")
    layerwise: bool = Field(default=True, description="blocks move while other layers compute")
    prefix_cache: PrefixCache = Field(default="global", description="whose blocks a prompt may reuse")
    chunked_prefill: bool = Field(default=True, description="else a prompt is one step, whatever is being decoded")
    save_outputs: bool = Field(default=True, description="blocks that answers fill are cached, too")
    eviction: PolicyName = Field(default="perigee", description="lru, s3fifo or perigee")
    placement: str = Field(default="perigee", description="the Conductor's policy")
    admission: str = Field(default="perigee", description="the Conductor's policy")
    balance: str = Field(default="none", description="the Conductor's policy")
    shadow: str | None = Field(
        default=None, description="policies that are asked as well and not obeyed: placement=NAME,admission=NAME"
    )
    role_hold_s: Positive = Field(default=DEFAULT_HOLD_S, description="how long one pool must need the other's worker")
    max_tokens: Count | None = Field(
        default=None, description="what clients say an answer may come to [default: what it comes to]"
    )
    slo_ttft_s: Positive | None = Field(default=None, description="longest time to first token")
    slo_tbt_s: Positive | None = Field(default=None, description="longest time between tokens")
    classes: tuple[RequestClass, ...] = Field(default=(), description="of requests; the others have priority 0")
    report_s: Positive = Field(default=0.25, description="the least time between two reports of a worker")
    store_wait_s: Positive = Field(default=600.0, description="how long a worker waits for slots or blocks")
    seed: int = Field(default=0, description="of what is drawn by lot")

    @field_validator("block_tokens")
    @classmethod
    def _power_of_two(cls, block_tokens: int) -> int:
        if block_tokens & (block_tokens - 1):
            raise ValueError(f"is {block_tokens}, allowed are powers of two")
        return block_tokens

    @field_validator("shadow")
    @classmethod
    def _policies(cls, shadow: str | None) -> str | None:
        if shadow is not None:
            parse_policies(shadow)
        return shadow

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_name("model", self.model, MODELS)
        _check_name("hardware", self.hardware, HARDWARE)
        _check_name("placement", self.placement, PLACEMENTS)
        _check_name("admission", self.admission, ADMISSIONS)
        _check_name("balance", self.balance, BALANCES)
        if (self.profile is None) == (self.model is None) or (self.model is None) != (self.hardware is None):
            raise ValueError("model, hardware, profile: allowed are the first two or the third")
        if sum(each.share for each in self.classes) > 1:
            raise ValueError("classes: the shares come to more than 1")
        roles = {role for group in self.nodes for role in group.roles}
        if "mixed" not in roles and roles != {"prefill", "decode"}:
            raise ValueError(f"nodes: there are only {', '.join(roles)} workers, allowed are both or mixed ones")
        if self.prefix_cache == "none" and roles != {"mixed"}:
            raise ValueError("prefix_cache: is 'none', allowed only if all workers are mixed: others hand blocks over")
        if self.prefix_cache == "local":
            self._check_local()
        if self.profile is not None:
            self._check_measured()
        return self

    def _check_local(self) -> None:
        """No policy moves prefixes from node to node."""
        for field, name, names in (("placement", self.placement, PLACEMENTS), ("balance", self.balance, BALANCES)):
            local = [each for each in names if each not in _FETCHING]
            _check_name(field, name, local, " with prefix_cache local")

    def _check_measured(self) -> None:
        for index, group in enumerate(self.nodes):
            if group.kv_tokens is None:
                raise ValueError(f"nodes.{index}.kv_tokens: is missing, which a profile does not say")
            needs_bytes = group.dram_gib or group.ssd_gib or group.nic_gbps or self.nic_gbps
            if needs_bytes and self.kv_bytes_per_token is None:
                raise ValueError(f"kv_bytes_per_token: is missing, which the sizes of nodes.{index} need")


def read_cluster(path: Path) -> Cluster:
    """Raises ClusterError, with the file, the field, its value and what is allowed."""
    try:
        cluster = Cluster.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ClusterError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ClusterError(f"{path}: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise ClusterError("\n".join(f"{path}: {_problem(each)}" for each in error.errors())) from error
    if cluster.profile is None:
        return cluster
    return cluster.model_copy(update={"profile": path.parent / cluster.profile})


def changed(cluster: Cluster, **fields: object) -> Cluster:
    """The same but for these fields. Raises ClusterError."""
    try:
        return Cluster.model_validate({**cluster.model_dump(), **fields})
    except ValidationError as error:
        raise ClusterError("\n".join(_problem(each) for each in error.errors())) from error


def _check_name(field: str, name: str | None, allowed: Iterable[str], where: str = "") -> None:
    names = list(allowed)
    if name is not None and name not in names:
        raise ValueError(f"{field}: is {name!r}, allowed{where} are {', '.join(names)}")


def _problem(problem: ErrorDetails) -> str:
    """Rules about several fields name them and their values themselves."""
    where = ".".join(map(str, problem["loc"]))
    reason = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{where}: is missing"
    if problem["type"] == "extra_forbidden":
        return f"{where}: no such field"
    if problem["type"] == "value_error":
        return f"{where}: {reason}" if where else reason
    if problem["type"] == "model_type":
        reason = "allowed are fields and their values"
    return f"{where}: {problem['input']!r}: {reason}".removeprefix(": ")
