"""What a worker is told at its start."""

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field

from perigee.kvstore.addresses import Advertise, DirectoryTarget, DirectoryUser, Listen
from perigee.workers.model.errors import UnsupportedModel
from perigee.workers.model.moba_config import OFF, MobaConfig

Role = Literal["prefill", "decode", "mixed"]
ROLES: tuple[Role, ...] = get_args(Role)


def computes_prompts(role: Role) -> bool:
    """Whether a worker of this role is sent prompts. A decode worker gets the blocks of what others computed."""
    return role != "decode"


def _readable_moba(text: str) -> str:
    try:
        if text not in ("", OFF):
            MobaConfig.parse(text)
    except UnsupportedModel as error:
        raise ValueError(str(error).removeprefix("moba: ")) from error
    return text


def _power_of_two(value: int) -> int:
    if value < 1 or value & (value - 1):
        raise ValueError("allowed are powers of two")
    return value


BlockTokens = Annotated[int, AfterValidator(_power_of_two)]

# What the checkpoint is to be told of block-sparse attention: nothing, that it is off, or what it is.
MobaText = Annotated[str, AfterValidator(_readable_moba)]


class WorkerConfig(DirectoryUser, frozen=True, extra="forbid"):
    """One worker: a model, a KV pool, and the role that it begins with."""

    id: str = Field(description="name in the cluster, unique")
    role: Role = Field(description="prefill, decode, or mixed for both; the Conductor may change it")
    model: str = Field(description="checkpoint: a directory, a GGUF file, a Hugging Face name or a built-in one")
    served_model_name: str = Field(default="", description="what the API calls it; default: the model's own name")
    listen: Listen = Field(
        default="127.0.0.1:0",
        description="where to serve gRPC: host:port (beyond loopback needs the cluster's secret), or unix:/path",
    )
    advertise: Advertise = Field(default="", description="host under which others reach this worker, if not listen's")
    store: Path = Field(description="local socket of the store node on this host")
    store_id: str = Field(default="store-0", description="id of that store node")
    directory: DirectoryTarget = Field(
        description="the cluster's directory: a gRPC target, or redis://host:port/0?prefix=NAME"
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="of weights and KVCache")
    moba: MobaText = Field(
        default="",
        description="block-sparse attention, such as block_size=512,top_k=3 (further full_layers, min_length, and "
        "decode, which is full or moba), or off; default: as the checkpoint says",
    )
    block_tokens: BlockTokens = Field(default=32, description="tokens a KVCache block, a power of two")
    kv_tokens: int = Field(default=65536, ge=1, description="tokens that the KV pool holds")
    max_batched_tokens: int = Field(default=2048, ge=1, description="tokens a step may compute")
    shared_prompt_tokens: int = Field(
        default=512,
        ge=1,
        description="prompts share a step only while they have so many tokens together; more makes first tokens later,"
        " and is worth it where a step of that many leaves the processor idle",
    )
    max_sequences: int = Field(default=32, ge=1, description="sequences that may hold pages at once")
    max_context: int = Field(default=0, ge=0, description="positions a sequence may have; 0: as many as the model has")
    threads: int = Field(default=0, ge=0, description="CPU threads a step uses; 0: all cores")
    store_wait_s: float = Field(
        default=60.0,
        gt=0,
        description="wait for the store node, and for blocks of a request without deadline",
    )
    drain_s: float = Field(
        default=25.0,
        ge=0,
        description="how long a worker that is told to end goes on with what it has; told again, it ends at once",
    )
