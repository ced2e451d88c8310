"""What a store allows, and what it counts."""

from dataclasses import dataclass

from perigee.kvstore.pins import PinLimits


@dataclass(slots=True)
class Totals:
    """What a store counts from its start. The store fills it.

    Hits and misses are those of acquires, which is to say of prompts: blocks leased and reserved.
    """

    hit_blocks: int = 0
    hit_ssd_blocks: int = 0  # of those, read from SSD
    miss_blocks: int = 0
    loaded_blocks: int = 0
    failed_loads: int = 0  # a record was corrupt, or the SSD failed
    spilled_blocks: int = 0
    pulled_blocks: int = 0
    failed_pulls: int = 0  # blocks that a pull was to bring and did not
    replicated_blocks: int = 0  # of those pulled, for nobody in particular
    trimmed_blocks: int = 0


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """What a store allows. Slots are kept free between `free_low` and `free_high` once there is an SSD to spill to."""

    pins: PinLimits
    reservation_s: float
    free_low: int
    free_high: int
    spills: int  # at once, ahead of need
    spill_wait_s: float = 1.0  # for which a request that may wait lets blocks be spilled before it takes their slots

    @classmethod
    def of(
        cls, num_slots: int, *, reservation_s: float = 600.0, pin_share: float = 0.25, free_share: float = 0.125
    ) -> "StoreLimits":
        """Such as suit an arena of this size. One tenant may pin `pin_share` of it, all together half of it."""
        return cls(
            PinLimits(int(num_slots * pin_share), num_slots // 2, max_ttl_s=86_400.0),
            reservation_s,
            free_low=int(num_slots * free_share / 2),
            free_high=int(num_slots * free_share),
            spills=max(1, min(64, int(num_slots * free_share))),
        )
