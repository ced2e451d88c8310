"""Native kernels against plain torch in float32, over every shape that takes another path through them."""

import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perigee.workers.kernels import native
from perigee.workers.kernels.base import DecodeBatch
from perigee.workers.kernels.native import NativeKernels, NativeUnavailable, load
from perigee.workers.kernels.reference import TorchKernels
from perigee.workers.kernels.registry import select

BF16_STEP = 2**-8


def _native() -> NativeKernels | None:
    try:
        return load()
    except NativeUnavailable:
        return None


KERNELS = _native()
needs_native = pytest.mark.skipif(KERNELS is None, reason="no compiler, or no AVX-512 bfloat16 on this machine")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def close(actual: Tensor, expected: Tensor, steps: float = 2.0) -> bool:
    """Within some bfloat16 steps of each value, or of the tensor's size where sums cancel."""
    expected = expected.float()
    scale = expected.abs().clamp(min=float(expected.abs().mean()))
    return bool(((actual.float() - expected).abs() <= steps * BF16_STEP * scale).all())


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    outputs=st.sampled_from([1, 2, 3, 17, 32, 64, 100, 192, 960]),
    width=st.sampled_from([32, 64, 96, 576, 40]),
    biased=st.booleans(),
)
def test_linear(rows: int, outputs: int, width: int, biased: bool) -> None:
    assert KERNELS
    x, weight = random(rows, width, seed=1), random(outputs, width, seed=2)
    bias = random(outputs, seed=3) if biased else None
    expected = x.float() @ weight.float().T + (bias.float() if bias is not None else 0)
    assert close(KERNELS.linear(x, weight, bias), expected)


@needs_native
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("width", [32, 576, 24])
@pytest.mark.parametrize("with_delta", [True, False])
def test_add_rms_norm(rows: int, width: int, with_delta: bool) -> None:
    assert KERNELS
    x, weight = random(rows, width), random(width, seed=2)
    delta = random(rows, width, seed=1) if with_delta else None
    total, normed = KERNELS.add_rms_norm(x, delta, weight, 1e-5)
    expected_total = x if delta is None else x + delta
    assert torch.equal(total, expected_total)
    exact = expected_total.float()
    assert close(normed, exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5) * weight.float())


@needs_native
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (7, 1536), (3, 24)])
def test_gated_silu(rows: int, width: int) -> None:
    assert KERNELS
    gate_up = random(rows, 2 * width) * 8
    gate, up = gate_up.float().chunk(2, dim=-1)
    assert close(KERNELS.gated_silu(gate_up), torch.nn.functional.silu(gate) * up)


@needs_native
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim"), [(1, 9, 3, 64), (9, 4, 4, 32), (5, 2, 1, 48)])
def test_rotate_and_store(tokens: int, heads: int, kv_heads: int, head_dim: int) -> None:
    assert KERNELS
    qkv = random(tokens, heads + 2 * kv_heads, head_dim)
    rope = (random(tokens, 1, head_dim, seed=1), random(tokens, 1, head_dim, seed=2))
    rows = torch.randperm(32, generator=torch.Generator().manual_seed(3))[:tokens]
    pool = torch.zeros(2, 32, kv_heads * head_dim, dtype=torch.bfloat16)
    exact = pool.float()
    q = KERNELS.rotate_and_store(qkv, rope, rows, *pool, heads)
    cos, sin = rope
    expected = TorchKernels().rotate_and_store(qkv.float(), (cos.float(), sin.float()), rows, *exact, heads)
    assert close(q, expected, steps=4)
    assert close(pool[0][rows], exact[0][rows], steps=4) and torch.equal(pool[1].float(), exact[1])
    assert not pool[0].index_fill(0, rows, 0).any(), "no other row is written"


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
    assert KERNELS
    num_heads, kv_heads = heads
    width = -(-max(contexts) // page_tokens)
    order = torch.randperm(width * len(contexts), generator=torch.Generator().manual_seed(0))
    pages = order.view(len(contexts), width).int()
    keys, values = (random(len(order) * page_tokens, kv_heads * head_dim, seed=s) for s in (1, 2))
    q = random(len(contexts), num_heads, head_dim, seed=3)
    batch = DecodeBatch(pages, torch.tensor(contexts), page_tokens, max(contexts))
    attended = KERNELS.attend_decode(q, keys, values, batch)
    assert attended is not None
    for index, context in enumerate(contexts):
        rows = (pages[index].long()[:, None] * page_tokens + torch.arange(page_tokens)).flatten()[:context]
        k, v = (pool[rows].float().view(context, kv_heads, head_dim) for pool in (keys, values))
        grouped = q[index].float().view(kv_heads, -1, head_dim)
        weights = torch.softmax(torch.einsum("hgd,thd->hgt", grouped, k) * head_dim**-0.5, dim=-1)
        expected = torch.einsum("hgt,thd->hgd", weights, v).view(num_heads, head_dim)
        assert torch.allclose(attended[index].float(), expected, atol=0.01, rtol=0.01)


@needs_native
def test_a_head_that_the_kernel_does_not_do_is_left_to_torch() -> None:
    assert KERNELS
    keys = random(32, 48)
    batch = DecodeBatch(torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3]), 32, 3)
    assert KERNELS.attend_decode(random(1, 1, 48), keys, keys, batch) is None


def test_float32_is_computed_by_torch() -> None:
    assert type(select("float32")) is TorchKernels


def test_without_a_compiler_torch_takes_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    load.cache_clear()
    try:
        assert type(select("bfloat16")) is TorchKernels
    finally:
        load.cache_clear()


@needs_native
def test_a_failing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        native.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, stdout="no such flag")
    )
    load.cache_clear()
    try:
        with pytest.raises(NativeUnavailable, match="no such flag"):
            load()
        assert not list(tmp_path.rglob("*.so"))
    finally:
        load.cache_clear()
