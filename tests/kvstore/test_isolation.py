"""Nobody hits what is not theirs: keys differ wherever the KVCache could, or must not be seen."""

from dataclasses import dataclass, replace

import pytest

from perigee.kvstore.blocks import PREFILL, BlockKey, DType, chain, namespace
from perigee.kvstore.evict import LRU
from perigee.kvstore.holdings import GroupId
from perigee.kvstore.messages import Acquired, CommittedBlock
from perigee.kvstore.store import Store
from perigee.kvstore.waiting import Caller

TOKENS = list(range(1000, 1100))
BLOCK_TOKENS = 32


@dataclass(frozen=True)
class Origin:
    """All that makes two equal prompts different."""

    weights: str = "weights"
    epoch: int = 0
    adapter: str = ""
    dtype: DType = "bfloat16"
    layout: int = 1
    attention: str = "dense"
    salt: bytes = bytes(32)  # the tenant's
    salt_block: int = 0

    def keys(self) -> tuple[BlockKey, list[BlockKey]]:
        root = namespace(
            weights_digest=self.weights,
            weights_epoch=self.epoch,
            adapter=self.adapter,
            dtype=self.dtype,
            layout_version=self.layout,
            block_tokens=BLOCK_TOKENS,
            attention=self.attention,
        )
        return root, chain(root, TOKENS, BLOCK_TOKENS, self.salt, self.salt_block)


ONE, OTHER = b"one tenant".ljust(32), b"other tenant".ljust(32)
ORIGINS = {
    "tenant": Origin(salt=ONE),
    "another tenant": Origin(salt=OTHER),
    "public": Origin(),
    "weights": Origin(weights="others"),
    "weights epoch": Origin(epoch=1),
    "adapter": Origin(adapter="lora"),
    "dtype": Origin(dtype="float32"),
    "layout": Origin(layout=2),
    "attention mode": Origin(attention="moba block=512 top_k=3"),
}


def _acquired(store: Store, origin: Origin, request: int) -> Acquired:
    root, keys = origin.keys()
    ((_, acquired),) = store.acquire(Caller(GroupId(1, request), request), keys, root, 0.0, 0.0)
    assert isinstance(acquired, Acquired)
    return acquired


def _store_with(origin: Origin) -> Store:
    store = Store(16, BLOCK_TOKENS, LRU())
    reserved = _acquired(store, origin, 1).reserved
    store.commit(GroupId(1, 1), [CommittedBlock(r.slot, r.nonce, 4, PREFILL) for r in reserved], 0.0)
    store.release(GroupId(1, 1), 0.0)
    return store


@pytest.mark.parametrize("asking", ORIGINS)
@pytest.mark.parametrize("cached", ORIGINS)
def test_equal_prompts_hit_within_an_origin_and_never_across(cached: str, asking: str) -> None:
    leased = _acquired(_store_with(ORIGINS[cached]), ORIGINS[asking], 2).leased
    assert len(leased) == (4 if cached == asking else 0)


def test_tenants_share_a_public_prefix_and_nothing_after_it() -> None:
    one, other = (replace(Origin(), salt=salt, salt_block=2) for salt in (ONE, OTHER))
    assert len(_acquired(_store_with(one), other, 2).leased) == 2
