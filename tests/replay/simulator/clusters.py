"""Clusters and traces small enough for their timelines to be computed by hand."""

from pathlib import Path

from perigee.replay.simulator.cluster import Cluster
from perigee.replay.trace import TraceRequest
from perigee.scheduler.cost import CostProfile
from perigee.scheduler.cost.profile_file import Origin, ProfileFile, write_profile

BLOCK = 32

# A millisecond for a token of a prompt, ten for a decode step and one more for each sequence in it, a tenth of one for
# a token that comes from another node; nothing else takes time.
PROFILE = CostProfile(
    prefill_fixed_s=0.0,
    prefill_token_s=1e-3,
    prefill_pair_s=0.0,
    load_token_s=0.0,
    transfer_fixed_s=0.0,
    transfer_token_s=1e-4,
    step_fixed_s=0.010,
    step_sequence_s=0.001,
    step_context_token_s=0.0,
)
PREFILL = {"roles": ["prefill"], "count": 1, "capacity_tokens": 4096, "kv_tokens": 4096, "chunk_tokens": 128}
DECODE = {"roles": ["decode"], "count": 1, "capacity_tokens": 4096, "kv_tokens": 4096}
MIXED = {**PREFILL, "roles": ["mixed"]}


def cluster(folder: Path, *nodes: dict[str, object], profile: CostProfile = PROFILE, **fields: object) -> Cluster:
    """One prefill and one decode node unless others are given; every request is let in unless it cannot be served."""
    path = folder / "profile.yaml"
    write_profile(path, ProfileFile.of(profile, Origin(method="made up")))
    said = {"admission": "none", "block_tokens": BLOCK, "save_outputs": False, **fields}
    return Cluster(name="small", profile=path, nodes=list(nodes) or [PREFILL, DECODE], **said)  # type: ignore[arg-type]


def request(arrival_s: float, input_tokens: int, output_tokens: int, first_id: int = 0) -> TraceRequest:
    """Its blocks have the ids from `first_id` on: requests of one `first_id` have one prefix."""
    ids = tuple(range(first_id, first_id + -(-input_tokens // BLOCK)))
    return TraceRequest(arrival_s, input_tokens, output_tokens, ids, BLOCK)
