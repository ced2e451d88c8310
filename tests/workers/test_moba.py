"""Block-sparse attention against a plain O(n²) mask formula, in float32, and the native form against the torch one."""

from collections.abc import Iterable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perigee.kvstore.blocks import PayloadLayout
from perigee.workers.attention.base import KVPool, Span, StepBatch
from perigee.workers.attention.grouped import GroupedAttention
from perigee.workers.attention.moba import attend_sparse, choose_blocks, merge
from perigee.workers.attention.varlen import attend_varlen
from perigee.workers.engine.pages import PageTable
from perigee.workers.kernels.base import DecodeBatch
from perigee.workers.kernels.build import NativeUnavailable
from perigee.workers.kernels.native import NativeKernels, load
from perigee.workers.kernels.reference import TorchKernels
from perigee.workers.model.moba_config import MobaConfig


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def centroids_of(keys: Tensor, block_size: int, context: int) -> Tensor:
    """Of the complete blocks before that of the last position."""
    blocks = (context - 1) // block_size
    return keys[: blocks * block_size].view(blocks, block_size, *keys.shape[1:]).mean(dim=1)


def by_mask(q: Tensor, keys: Tensor, values: Tensor, start: int, scale: float, block_size: int, top_k: int) -> Tensor:
    """The paper's formula, every score computed: what a query must not see is -inf before the softmax."""
    length, heads, _ = q.shape
    group = heads // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    out = torch.empty(length, heads, values.shape[-1])
    for row in range(length):
        position = start + row
        own = position // block_size
        for head in range(heads):
            gate = [float(q[row, head] @ keys[b * block_size : (b + 1) * block_size, head].mean(0)) for b in range(own)]
            best = sorted(range(own), key=lambda b: -gate[b])[: top_k - 1]
            seen = torch.zeros(position + 1, dtype=torch.bool)
            seen[own * block_size :] = True
            for block in best:
                seen[block * block_size : (block + 1) * block_size] = True
            scores = (keys[: position + 1, head] @ q[row, head]) * scale
            out[row, head] = scores.masked_fill(~seen, -torch.inf).softmax(0) @ values[: position + 1, head]
    return out


def sparse(q: Tensor, keys: Tensor, values: Tensor, start: int, scale: float, block_size: int, top_k: int) -> Tensor:
    centroids = centroids_of(keys, block_size, start + len(q))
    chosen = choose_blocks(q, centroids, start, block_size, top_k - 1)
    return attend_sparse(q, keys, values, start, scale, chosen, block_size, attend_varlen)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 40),
    start=st.integers(0, 70),
    heads=st.sampled_from([(4, 4), (6, 2), (3, 1)]),
    block_size=st.sampled_from([1, 4, 16, 32]),
    top_k=st.integers(1, 5),
    value_dim=st.sampled_from([8, 12]),
)
def test_equals_the_mask_formula(
    length: int, start: int, heads: tuple[int, int], block_size: int, top_k: int, value_dim: int
) -> None:
    num_heads, kv_heads = heads
    q = random(length, num_heads, 8, seed=1)
    keys, values = random(start + length, kv_heads, 8, seed=2), random(start + length, kv_heads, value_dim, seed=3)
    expected = by_mask(q, keys, values, start, 8**-0.5, block_size, top_k)
    assert torch.allclose(sparse(q, keys, values, start, 8**-0.5, block_size, top_k), expected, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 79), max_size=5), block_size=st.sampled_from([4, 8, 32]), top_k=st.integers(1, 4))
def test_chunks_of_any_size_choose_and_compute_the_same(cuts: list[int], block_size: int, top_k: int) -> None:
    q, keys, values = random(80, 4, 8, seed=1), random(80, 2, 8, seed=2), random(80, 2, 8, seed=3)
    whole = sparse(q, keys, values, 0, 0.3, block_size, top_k)
    edges = sorted({0, *cuts, 80})
    parts = [sparse(q[a:b], keys[:b], values[:b], a, 0.3, block_size, top_k) for a, b in pairwise(edges)]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-5)


def test_with_all_blocks_it_is_full_attention() -> None:
    q, keys, values = random(50, 4, 8, seed=1), random(90, 2, 8, seed=2), random(90, 2, 8, seed=3)
    full, _ = attend_varlen(q, keys, values, edges([50]), edges([90]), 50, 90, softmax_scale=0.3, causal=True)
    assert torch.allclose(sparse(q, keys, values, 40, 0.3, 16, 99), full, atol=1e-5)


def test_no_block_of_the_future_or_its_own_is_ever_chosen() -> None:
    q, keys = random(64, 2, 8, seed=1), random(64, 2, 8, seed=2)
    keys[32:] *= 100  # so that any gate would like them best
    chosen = choose_blocks(q, centroids_of(keys, 8, 64), 0, 8, 3)
    own = torch.arange(64)[:, None, None] // 8
    assert (chosen < own).all() and (chosen[:8] == -1).all() and (chosen[-1] >= 0).all()


def test_the_latents_centroid_gates_every_head_exactly() -> None:
    heads, rank, nope, rope, block = 3, 16, 8, 4, 10
    up, latent, turned = random(heads, nope, rank), random(block, rank, seed=1), random(block, rope, seed=2)
    q = random(heads, nope + rope, seed=3)
    keys = torch.cat([torch.einsum("hnr,tr->thn", up, latent), turned[:, None].expand(-1, heads, -1)], dim=-1)
    by_keys = torch.einsum("hd,hd->h", q, keys.mean(0))
    absorbed = torch.cat([torch.einsum("hnr,hn->hr", up, q[:, :nope]), q[:, nope:]], dim=-1)
    centroid = torch.cat([latent, turned], dim=-1).mean(0)
    assert torch.allclose(absorbed @ centroid, by_keys, atol=1e-5)


def test_parts_merge_to_the_whole() -> None:
    q, keys, values = random(5, 2, 8, seed=1), random(30, 2, 8, seed=2), random(30, 2, 8, seed=3)

    def attend(first: int, stop: int) -> tuple[Tensor, Tensor]:
        part = slice(first, stop)
        packed = (edges([5]), edges([stop - first]), 5, stop - first)
        return attend_varlen(q, keys[part], values[part], *packed, softmax_scale=0.3, causal=False)

    (one, one_sum), (other, other_sum) = attend(0, 11), attend(11, 30)
    merged = merge(torch.stack([one, other], dim=2), torch.stack([one_sum.T, other_sum.T], dim=2))
    assert torch.allclose(merged, attend(0, 30)[0], atol=1e-6)


def test_packed_sequences_do_not_see_each_other() -> None:
    lengths, contexts = [3, 1, 4], [5, 1, 9]
    q, keys, values = random(8, 2, 8, seed=1), random(15, 1, 8, seed=2), random(15, 1, 6, seed=3)
    out, logsum = attend_varlen(q, keys, values, edges(lengths), edges(contexts), 4, 9, softmax_scale=0.5, causal=True)
    for i, (at, first) in enumerate(zip([0, 3, 4], [0, 5, 6], strict=True)):
        queries, part = slice(at, at + lengths[i]), slice(first, first + contexts[i])
        alone = edges([lengths[i]]), edges([contexts[i]]), lengths[i], contexts[i]
        expected = attend_varlen(q[queries], keys[part], values[part], *alone, softmax_scale=0.5, causal=True)
        assert torch.equal(out[queries], expected[0]) and torch.equal(logsum[:, queries], expected[1])


def test_it_is_differentiable() -> None:
    q, keys, values = (random(40, 2, 8, seed=s).requires_grad_() for s in (1, 2, 3))
    sparse(q, keys, values, 0, 0.3, 8, 3).square().sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in (q, keys, values))


def edges(lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def worst_score(q: Tensor, centroids: Tensor, chosen: Tensor) -> Tensor:
    """The least gate score of what each query chose, [length, heads]; inf where it chose nothing."""
    if not len(centroids) or not chosen.shape[-1]:
        return torch.full(q.shape[:2], torch.inf)
    group = q.shape[1] // centroids.shape[1]
    scores = torch.einsum("lhd,bhd->lhb", q.float(), centroids.repeat_interleave(group, dim=1))
    return scores.gather(-1, chosen.clamp(min=0)).masked_fill(chosen < 0, torch.inf).amin(-1)


def _native() -> dict[str, NativeKernels]:
    try:
        return {"tiles": load(), "vectors": load(tiles=False)}
    except NativeUnavailable:
        return {}


KERNELS = _native()


@pytest.mark.skipif(not KERNELS, reason="no compiler, or no AVX-512 bfloat16 on this machine")
@pytest.mark.parametrize("unit", ["tiles", "vectors"])
@settings(max_examples=40, deadline=None)
@given(
    length=st.sampled_from([1, 3, 33, 200, 2100]),
    start=st.sampled_from([0, 31, 320, 500]),
    heads=st.sampled_from([(4, 4), (6, 2), (4, 1)]),
    block_size=st.sampled_from([32, 64, 160]),
    top_k=st.sampled_from([1, 2, 4]),
    shared=st.sampled_from([0, 32]),
)
def test_the_native_form_equals_the_torch_form(
    unit: str, length: int, start: int, heads: tuple[int, int], block_size: int, top_k: int, shared: int
) -> None:
    kernels, (num_heads, kv_heads), context = KERNELS[unit], heads, start + length
    q = random(length, num_heads, 64, seed=1).bfloat16()
    both = (random(context, kv_heads, 64 - shared + 96, seed=2) + 1).bfloat16()  # keys have much in common
    own, values = both[..., : 64 - shared], both[..., 64 - shared :]
    common = random(context, shared, seed=3).bfloat16()
    keys = torch.cat([own, common[:, None].expand(-1, kv_heads, -1)], dim=-1)
    centroids = centroids_of(keys.float(), block_size, context)
    chosen = kernels.choose_blocks(q, centroids, start, block_size, top_k - 1)
    expected = choose_blocks(q, centroids, start, block_size, top_k - 1)
    assert torch.equal((chosen >= 0).sum(-1), (expected >= 0).sum(-1))
    worst, least = (worst_score(q, centroids, blocks.long()) for blocks in (chosen, expected))
    # What it chose instead of the best ties with it within the rounding of centroids, less what they have in common.
    spread = (centroids - centroids[:1]).norm(dim=-1).max() if len(centroids) else torch.zeros(())
    assert (worst >= least - 2**-8 * spread * q.float().norm(dim=-1)).all()
    attended = kernels.attend_sparse(
        q, own, values, start, 0.2, chosen, block_size, shared_keys=common if shared else None
    )
    assert attended is not None
    exact = attend_sparse(q.float(), keys.float(), values.float(), start, 0.2, chosen.long(), block_size, attend_varlen)
    assert torch.allclose(attended.float(), exact, atol=0.02, rtol=0.02)


@pytest.mark.skipif(not KERNELS, reason="no compiler, or no AVX-512 bfloat16 on this machine")
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_sparse_decode_over_pages_equals_the_torch_form(kv_heads: int) -> None:
    """Each head reads the pages it chose; positions below min_length, and prompts that decode full, read all."""
    moba = MobaConfig(block_size=64, top_k=3, min_length=70, decode="moba")
    pool = KVPool(PayloadLayout(1, 2, kv_heads * 32, "bfloat16", 32), 64, with_centroids=True)
    pool.tensor.copy_(random(*pool.tensor.shape))
    cache, order = pool.layers[0], torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()
    cache.summarise(torch.arange(64))
    starts = [0, 63, 64, 70, 200, 447]
    spans, first = [], 0
    for row, start in enumerate(starts):
        pages = PageTable(tuple(order[first : first + start // 32 + 1]), 32)
        first += start // 32 + 1
        spans.append(Span(row, 1, start, 10, pages, torch.bfloat16))
    width = max(len(span.pages.pages) for span in spans)
    tables = torch.tensor([span.pages.pages + (0,) * (width - len(span.pages.pages)) for span in spans]).int()
    decode = DecodeBatch(tables, torch.tensor(starts) + 1, 32)
    none = torch.empty(0, dtype=torch.int64)
    q = random(len(starts), 4, 32, seed=2).bfloat16()
    native, plain = (
        GroupedAttention(kv_heads, 32, kernels, moba).attend(
            q, cache, StepBatch(torch.tensor(starts), none, tuple(spans), decode, none)
        )
        for kernels in (KERNELS["tiles"], TorchKernels())
    )
    assert torch.allclose(native.float(), plain.float(), atol=0.02, rtol=0.02)
