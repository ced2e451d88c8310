"""Native kernels against plain torch in float32, over every shape that takes another path through them, with the
processor's matrix unit and without."""

import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perigee.workers.kernels import build
from perigee.workers.kernels.base import Chosen, DecodeBatch, Matrix, Rope, Routing
from perigee.workers.kernels.build import NativeUnavailable
from perigee.workers.kernels.native import NativeKernels, load
from perigee.workers.kernels.reference import TorchKernels
from perigee.workers.kernels.registry import select

BF16_STEP = 2**-8
REFERENCE = TorchKernels()


def _native() -> dict[str, NativeKernels]:
    try:
        return {"tiles": load(), "vectors": load(tiles=False)}
    except NativeUnavailable:
        return {}


KERNELS = _native()
needs_native = pytest.mark.skipif(not KERNELS, reason="no compiler, or no AVX-512 bfloat16 on this machine")
both_units = pytest.mark.parametrize("unit", ["tiles", "vectors"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return (random(*shape, seed=seed).float() * shape[-1] ** -0.5).bfloat16()


def close(actual: Tensor, expected: Tensor, steps: float = 2.0) -> bool:
    """Within some bfloat16 steps of each value, or of the tensor's size where sums cancel."""
    expected = expected.float()
    scale = expected.abs().clamp(min=float(expected.abs().mean()))
    return bool(((actual.float() - expected).abs() <= steps * BF16_STEP * scale).all())


@needs_native
@both_units
@settings(max_examples=80, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 50, 129, 300]),
    outputs=st.sampled_from([16, 32, 48, 64, 192, 960, 17, 100]),
    width=st.sampled_from([32, 64, 96, 576, 40]),
    biased=st.booleans(),
    sliced=st.booleans(),
)
def test_linear(unit: str, rows: int, outputs: int, width: int, biased: bool, sliced: bool) -> None:
    kernels = KERNELS[unit]
    x = random(rows, width + 8, seed=1)[:, :width] if sliced else random(rows, width, seed=1)
    weight = matrix(outputs, width, seed=2)
    bias = random(outputs, seed=3) if biased else None
    expected = x.float() @ weight.float().T + (bias.float() if bias is not None else 0)
    assert close(kernels.linear(x, *kernels.matrices(weight.clone()), bias), expected)


@needs_native
@both_units
@pytest.mark.parametrize("rows", [1, 3, 40, 300])
@pytest.mark.parametrize(("outputs", "width"), [(1024, 576), (48, 32)])
def test_logits_are_sums_that_are_not_rounded(unit: str, rows: int, outputs: int, width: int) -> None:
    kernels = KERNELS[unit]
    x, weight = random(2 * rows, width, seed=1)[::2], matrix(outputs, width, seed=2)
    logits = kernels.logits(x, *kernels.matrices(weight.clone()))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ weight.float().T, rtol=1e-4, atol=1e-4)


@needs_native
def test_logits_of_a_matrix_that_is_not_packed_are_float32_too() -> None:
    x, weight = random(3, 40), random(50, 40)
    logits = KERNELS["tiles"].logits(x, *KERNELS["tiles"].matrices(weight.clone()))
    assert logits.dtype == torch.float32 and close(logits.bfloat16(), x.float() @ weight.float().T)


@needs_native
@pytest.mark.parametrize("shape", [(64, 96), (50, 96), (64, 40)])
def test_rows_of_a_matrix_come_back_as_they_were(shape: tuple[int, int]) -> None:
    kernels = KERNELS["tiles"]
    weight = random(*shape)
    indices = torch.tensor([0, 17, 49, 17])
    assert torch.equal(kernels.rows(*kernels.matrices(weight.clone()), indices), weight[indices])


@needs_native
@both_units
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize(("heads", "width", "outputs"), [(4, 128, 512), (3, 32, 48), (2, 40, 32)])
@pytest.mark.parametrize("rest", [0, 24])
def test_linear_heads(unit: str, tokens: int, heads: int, width: int, outputs: int, rest: int) -> None:
    kernels = KERNELS[unit]
    x, weight = random(tokens, heads, width + rest), matrix(heads, outputs, width, seed=1)
    expected = torch.einsum("thi,hoi->tho", x[..., :width].float(), weight.float())
    packed = kernels.matrices(weight)
    for laid_out in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        out = kernels.linear_heads(laid_out, *packed)
        assert close(out[..., :outputs], expected) and torch.equal(out[..., outputs:], x[..., width:])


@needs_native
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("width", [32, 576, 24])
@pytest.mark.parametrize("with_delta", [True, False])
def test_add_rms_norm(rows: int, width: int, with_delta: bool) -> None:
    x, weight = random(rows, width), random(width, seed=2)
    delta = random(rows, width, seed=1) if with_delta else None
    total, normed = KERNELS["tiles"].add_rms_norm(x, delta, weight, 1e-5)
    expected_total = x if delta is None else x + delta
    assert torch.equal(total, expected_total)
    exact = expected_total.float()
    assert close(normed, exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5) * weight.float())


@needs_native
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (7, 1536), (3, 24)])
def test_gated_silu(rows: int, width: int) -> None:
    gate_up = random(rows, 2 * width) * 8
    gate, up = gate_up.float().chunk(2, dim=-1)
    assert close(KERNELS["tiles"].gated_silu(gate_up), torch.nn.functional.silu(gate) * up)


@needs_native
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim"), [(1, 9, 3, 64), (9, 4, 4, 32), (5, 2, 1, 48)])
def test_rotate_and_store(tokens: int, heads: int, kv_heads: int, head_dim: int) -> None:
    qkv = random(tokens, heads + 2 * kv_heads, head_dim)
    rope, exact_rope = _rope(tokens, head_dim, interleaved=False)
    rows = torch.randperm(32, generator=torch.Generator().manual_seed(3))[:tokens]
    pool = torch.zeros(2, 32, kv_heads * head_dim, dtype=torch.bfloat16)
    exact = pool.float()
    q = KERNELS["tiles"].rotate_and_store(qkv, rope, rows, *pool, heads)
    expected = REFERENCE.rotate_and_store(qkv.float(), exact_rope, rows, *exact, heads)
    assert close(q, expected, steps=4)
    assert close(pool[0][rows], exact[0][rows], steps=4) and torch.equal(pool[1].float(), exact[1])
    assert not pool[0].index_fill(0, rows, 0).any(), "no other row is written"


@needs_native
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("tokens", "rank", "rope_dim"), [(1, 512, 64), (7, 48, 32), (5, 64, 16)])
def test_rotate_and_store_latent(tokens: int, rank: int, rope_dim: int, interleaved: bool) -> None:
    both = random(tokens, 3 * (32 + rope_dim) + rank + rope_dim)  # as one projection makes them
    split = 3 * (32 + rope_dim)
    q, latent = both[:, :split].view(tokens, 3, -1), both[:, split:]
    norm = random(rank, seed=4)
    rope, exact_rope = _rope(tokens, rope_dim, interleaved=interleaved)
    rows = torch.randperm(32, generator=torch.Generator().manual_seed(3))[:tokens]
    pool = torch.zeros(32, rank + rope_dim, dtype=torch.bfloat16)
    exact = pool.float()
    turned = KERNELS["tiles"].rotate_and_store_latent(q, latent, norm, 1e-6, rope, rows, pool)
    expected = REFERENCE.rotate_and_store_latent(q.float(), latent.float(), norm.float(), 1e-6, exact_rope, rows, exact)
    assert close(turned, expected, steps=6) and close(pool[rows], exact[rows], steps=6)


def _rope(tokens: int, dim: int, *, interleaved: bool) -> tuple[Rope, Rope]:
    cos, sin = random(tokens, 1, dim, seed=1), random(tokens, 1, dim, seed=2)
    return Rope(cos, sin, interleaved), Rope(cos.float(), sin.float(), interleaved)


ROUTINGS = [
    Routing(16, 4, "noaux_tc", "sigmoid", 1, 1, True, 2.4),
    Routing(24, 3, "noaux_tc", "sigmoid", 4, 2, True, 1.0),
    Routing(8, 8, "greedy", "softmax", 1, 1, False, 1.5),
    Routing(24, 2, "group_limited_greedy", "softmax", 8, 3, False, 1.0),
]


@needs_native
@pytest.mark.parametrize("routing", ROUTINGS, ids=lambda routing: f"{routing.method}-{routing.num_groups}")
@pytest.mark.parametrize("tokens", [1, 33])
def test_routing_chooses_as_torch_does(routing: Routing, tokens: int) -> None:
    x, weight = random(tokens, 64), random(routing.num_experts, 64, seed=1)
    bias = random(routing.num_experts, seed=2).float() * 0.1 if routing.method == "noaux_tc" else None
    weights, experts = KERNELS["tiles"].route(x, weight, bias, routing)
    expected_weights, expected = REFERENCE.route(x, weight, bias, routing)
    order, expected_order = experts.argsort(dim=-1), expected.argsort(dim=-1)
    assert torch.equal(experts.gather(1, order), expected.gather(1, expected_order))
    assert torch.allclose(weights.gather(1, order), expected_weights.gather(1, expected_order), atol=1e-5)


@needs_native
@both_units
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.sampled_from([1, 2, 5, 16, 33, 150, 400]),
    chosen=st.integers(1, 4),
    shared=st.integers(0, 2),
    inter=st.sampled_from([32, 48, 96]),
)
def test_experts_equal_the_sum_over_every_choice(unit: str, tokens: int, chosen: int, shared: int, inter: int) -> None:
    kernels, routed, width = KERNELS[unit], 5, 64
    generator = torch.Generator().manual_seed(7)
    x = random(tokens, width)
    gate_up, down = matrix(routed + shared, 2 * inter, width, seed=1), matrix(routed + shared, width, inter, seed=2)
    experts = torch.stack([torch.randperm(routed, generator=generator)[:chosen] for _ in range(tokens)])
    weights = torch.rand(tokens, chosen, generator=generator)
    expected = torch.zeros(tokens, width)
    for token in range(tokens):
        pairs = [*zip(experts[token], weights[token], strict=True), *((routed + s, 1.0) for s in range(shared))]
        for expert, weight in pairs:
            gate, up = (gate_up[expert].float() @ x[token].float()).chunk(2)
            expected[token] += weight * (down[expert].float() @ (torch.nn.functional.silu(gate) * up))
    matrices = kernels.matrices(gate_up.clone(), down.clone())
    assert close(kernels.experts(x, Chosen(experts, weights, shared), *matrices), expected, steps=16)
    plain = REFERENCE.experts(
        x.float(), Chosen(experts, weights, shared), Matrix(gate_up.float()), Matrix(down.float())
    )
    assert torch.allclose(plain, expected, atol=1e-4)


@pytest.mark.parametrize("unit", [*KERNELS, "torch"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_an_expert_is_computed_for_nobody_but_who_chose_it(unit: str, tokens: int) -> None:
    kernels = KERNELS.get(unit, REFERENCE)
    gate_up, down = matrix(4, 64, 64), matrix(4, 64, 32, seed=1)
    poisoned = 2
    gate_up[poisoned], down[poisoned] = torch.nan, torch.nan
    matrices = kernels.matrices(gate_up, down)
    experts = torch.tensor([[0, 1]]).repeat(tokens, 1)
    chosen = Chosen(experts, torch.ones(tokens, 2), num_shared=1)
    assert kernels.experts(random(tokens, 64), chosen, *matrices).isfinite().all()
    experts[-1, 1] = poisoned
    out = kernels.experts(random(tokens, 64), chosen, *matrices)
    assert out[:-1].isfinite().all() and out[-1].isnan().all()


@needs_native
@both_units
@settings(max_examples=60, deadline=None)
@given(
    length=st.sampled_from([1, 2, 17, 32, 63, 128, 130, 300]),
    start=st.sampled_from([0, 1, 31, 32, 100, 257]),
    heads=st.sampled_from([(6, 3), (4, 4), (4, 1)]),
    dims=st.sampled_from([(64, 0, 64), (128, 64, 128), (32, 32, 64), (576, 0, 512)]),
)
def test_attention_of_a_chunk(
    unit: str, length: int, start: int, heads: tuple[int, int], dims: tuple[int, int, int]
) -> None:
    (num_heads, kv_heads), (own, shared, value_dim) = heads, dims
    context = start + length
    both = random(context, kv_heads, own + value_dim, seed=1)  # keys and values, as one projection makes them
    keys, values = both[..., :own], both[..., own:]
    common = random(context, shared + 32, seed=2)[:, :shared]
    q = random(length, num_heads, own + shared, seed=3)
    scale = (own + shared) ** -0.5
    attended = KERNELS[unit].attend_chunk(q, keys, values, start, scale, shared_keys=common if shared else None)
    assert attended is not None
    k = torch.cat([keys, common[:, None].expand(-1, kv_heads, -1)], dim=-1).float()
    grouped = q.float().view(length, kv_heads, -1, own + shared)
    scores = torch.einsum("lhgd,thd->hglt", grouped, k) * scale
    hidden = torch.arange(context)[None, :] > start + torch.arange(length)[:, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    expected = torch.einsum("hglt,thd->lhgd", weights, values.float()).reshape(length, num_heads, value_dim)
    assert torch.allclose(attended.float(), expected, atol=0.015, rtol=0.015)


@needs_native
@settings(max_examples=40, deadline=None)
@given(
    contexts=st.lists(st.integers(1, 700), min_size=1, max_size=5),
    heads=st.sampled_from([(9, 3), (4, 4), (16, 1)]),
    head_dim=st.sampled_from([32, 64, 128]),
    page_tokens=st.sampled_from([16, 32, 64]),
)
def test_attention_over_scattered_pages(
    contexts: list[int], heads: tuple[int, int], head_dim: int, page_tokens: int
) -> None:
    num_heads, kv_heads = heads
    pages, batch = _scattered(contexts, page_tokens)
    keys, values = (random(pages.numel() * page_tokens, kv_heads * head_dim, seed=s) for s in (1, 2))
    q = random(len(contexts), num_heads, head_dim, seed=3)
    attended = KERNELS["tiles"].attend_decode(q, keys, values, batch, head_dim**-0.5)
    assert attended is not None
    for index, context in enumerate(contexts):
        rows = _rows(pages[index], context, page_tokens)
        expected = _attend_one(q[index], keys[rows], values[rows], kv_heads)
        assert torch.allclose(attended[index].float(), expected, atol=0.01, rtol=0.01)


@needs_native
def test_attention_over_latents_whose_first_part_is_the_value() -> None:
    contexts, page_tokens = [1, 40, 333], 32
    pages, batch = _scattered(contexts, page_tokens)
    latents = random(pages.numel() * page_tokens, 576)
    q = random(len(contexts), 16, 576, seed=1)
    attended = KERNELS["tiles"].attend_decode(q, latents, latents[:, :512], batch, 576**-0.5)
    assert attended is not None
    for index, context in enumerate(contexts):
        rows = _rows(pages[index], context, page_tokens)
        expected = _attend_one(q[index], latents[rows], latents[rows][:, :512], 1)
        assert torch.allclose(attended[index].float(), expected, atol=0.01, rtol=0.01)


def _scattered(contexts: list[int], page_tokens: int) -> tuple[Tensor, DecodeBatch]:
    width = -(-max(contexts) // page_tokens)
    order = torch.randperm(width * len(contexts), generator=torch.Generator().manual_seed(0))
    pages = order.view(len(contexts), width).int()
    return pages, DecodeBatch(pages, torch.tensor(contexts), page_tokens)


def _rows(pages: Tensor, context: int, page_tokens: int) -> Tensor:
    return (pages.long()[:, None] * page_tokens + torch.arange(page_tokens)).flatten()[:context]


def _attend_one(q: Tensor, keys: Tensor, values: Tensor, kv_heads: int) -> Tensor:
    """One query of every head, by the formula."""
    k, v = (t.float().view(len(t), kv_heads, -1) for t in (keys, values))
    grouped = q.float().view(kv_heads, -1, q.shape[-1])
    weights = torch.softmax(torch.einsum("hgd,thd->hgt", grouped, k) * q.shape[-1] ** -0.5, dim=-1)
    return torch.einsum("hgt,thd->hgd", weights, v).flatten(0, 1)


@needs_native
def test_a_head_that_the_kernel_does_not_do_is_left_to_torch() -> None:
    keys = random(32, 48)
    batch = DecodeBatch(torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3]), 32)
    assert KERNELS["tiles"].attend_decode(random(1, 1, 48), keys, keys, batch, 1.0) is None
    assert KERNELS["tiles"].attend_chunk(random(2, 1, 48), keys[:2, None], keys[:2, None], 0, 1.0) is None


def test_float32_is_computed_by_torch() -> None:
    assert type(select("float32")) is TorchKernels


def test_without_a_compiler_torch_takes_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    build.library.cache_clear()
    try:
        assert type(select("bfloat16")) is TorchKernels
    finally:
        build.library.cache_clear()


@needs_native
def test_a_failing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, stdout="no such flag")
    monkeypatch.setattr(build.subprocess, "run", lambda *a, **k: failed)
    build.library.cache_clear()
    try:
        with pytest.raises(NativeUnavailable, match="no such flag"):
            load()
        assert not list(tmp_path.rglob("*.so"))
    finally:
        build.library.cache_clear()
