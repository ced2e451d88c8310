"""The paper's testbed: nodes of eight A800 that serve LLaMA3-70B (FAST '25, section 5.1)."""

from perigee.replay.simulator.cluster import Cluster, NodeGroup, PrefixCache

NUM_NODES = 16
NODE_TOKENS = 3_000_000
"""KVCache that a node's DRAM holds, about 1 TB (section 5.3)."""

HBM_TOKENS = 1_000_000
"""KVCache that vLLM finds room for beside the weights and what is being computed, per node."""

CHUNK_TOKENS = 512
"""What a step of vLLM with chunked prefill computes, by its default of that time."""

MAX_TOKENS = 4096
"""What clients say an answer may come to, where the scheduler predicts: it must not know the lengths in advance."""

MODEL, HARDWARE = "LLaMA3-70B", "A800-80G"


def mooncake(
    prefill: int = 8,
    decode: int = 8,
    placement: str = "global-cache",
    admission: str = "none",
    capacity_tokens: int = NODE_TOKENS,
    nic_gbps: float | None = None,
    prefix_cache: PrefixCache = "global",
    slo: tuple[float, float] | None = None,
    eviction: str = "lru",
    max_sequences: int = 256,
) -> Cluster:
    """Disaggregated, with the paper's policies unless others are asked for. `slo` are the bounds on TTFT and TBT that
    the Conductor knows of, in seconds.
    """
    return Cluster(
        name=f"Mooncake {prefill}P+{decode}D",
        model=MODEL,
        hardware=HARDWARE,
        nodes=(
            NodeGroup(roles=("prefill",), count=prefill, capacity_tokens=capacity_tokens, max_sequences=max_sequences),
            NodeGroup(roles=("decode",), count=decode, capacity_tokens=capacity_tokens, max_sequences=max_sequences),
        ),
        nic_gbps=nic_gbps,
        prefix_cache=prefix_cache,
        eviction=eviction,
        placement=placement,
        admission=admission,
        slo_ttft_s=slo[0] if slo else None,
        slo_tbt_s=slo[1] if slo else None,
        max_tokens=MAX_TOKENS if slo else None,
    )


def vllm(name: str, prefix_caching: bool = False, chunked_prefill: bool = False) -> Cluster:
    """Coupled: as many nodes, each of which does both phases of the requests that come to it in turn."""
    tokens = CHUNK_TOKENS if chunked_prefill else 8192
    return Cluster(
        name=name,
        model=MODEL,
        hardware=HARDWARE,
        nodes=(NodeGroup(roles=("mixed",), count=NUM_NODES, capacity_tokens=HBM_TOKENS, chunk_tokens=tokens),),
        prefix_cache="local" if prefix_caching else "none",
        chunked_prefill=chunked_prefill,
        eviction="lru",
        placement="round-robin",
        admission="none",
    )


VLLM = {
    "vllm": vllm("vLLM"),
    "vllm_prefix_caching": vllm("vLLM, prefix caching", prefix_caching=True),
    "vllm_chunked_prefill": vllm("vLLM, chunked prefill", chunked_prefill=True),
}
