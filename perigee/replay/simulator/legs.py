"""One attempt's part on one worker: what a worker of the cluster keeps as a session."""

from collections.abc import Callable
from dataclasses import dataclass, field

from perigee.kvstore.holdings import GroupId
from perigee.kvstore.messages import LeasedBlock, Reservation, Tier
from perigee.replay.metrics import CachedByTier
from perigee.workers.engine.batcher import Active
from perigee.workers.engine.sequence import FinishReason, Ref, Sequence


@dataclass(frozen=True, slots=True)
class Gaps:
    """`count` times between tokens in a row, each about `seconds`."""

    seconds: float
    count: int


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What prefill tells with its token, as workers do."""

    ref: Ref
    finish_reason: FinishReason
    cached: CachedByTier
    queue_s: float
    load_s: float
    compute_s: float


@dataclass(slots=True, eq=False)
class Leg:
    """The worker fills it. `hands_over` where another worker decodes; `is_over` once the worker has forgotten it."""

    sequence: Sequence
    source: str
    output_tokens: int
    arrived_at: float
    hands_over: bool = False
    is_over: bool = False
    active: Active | None = None
    group: GroupId | None = None
    # Prefill, until its first token is out.
    prefills: bool = False
    slots: dict[int, Reservation] = field(default_factory=dict)  # by block
    pulled: set[int] = field(default_factory=set)  # blocks that came from another node
    leased: tuple[LeasedBlock, ...] = ()
    load_began_at: float = 0.0
    load_s: float = 0.0
    started_at: float | None = None  # its first chunk
    # Decode.
    loads: int = 0  # of blocks that are on their way into the pages
    fetched: bool = False  # all blocks have come to the node
    joins: Callable[[], None] | None = None  # once prefill's token is let through
    last_token_at: float = 0.0

    @property
    def ref(self) -> Ref:
        return self.sequence.ref

    def cached(self) -> CachedByTier:
        """What the first chunk began after."""
        assert self.active is not None
        counts = dict.fromkeys(("dram", "ssd", "remote"), 0)
        left = self.active.cached  # the last token is computed even when its block was cached
        for block in self.leased:
            used = min(block.num_tokens, left)
            left -= used
            counts["remote" if block.index in self.pulled else "ssd" if block.tier is Tier.SSD else "dram"] += used
        return CachedByTier(**counts)
