"""What is packed for FlashAttention, with its CPU reference in its place: the library itself needs a GPU."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from perigee.workers.attention.flash import select_varlen
from perigee.workers.attention.moba import attend_sparse, choose_blocks
from perigee.workers.attention.varlen import attend_varlen


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    return_attn_probs: bool,
) -> tuple[Tensor, Tensor, None]:
    """The published signature and demands: one head size, int32 edges, lengths that hold."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256 and return_attn_probs
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q.diff().max() <= max_seqlen_q and cu_seqlens_k.diff().max() <= max_seqlen_k
    assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return *attend_varlen(q, k, v, *lengths, softmax_scale=softmax_scale, causal=causal), None


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize(("length", "start", "value_dim"), [(70, 0, 16), (33, 50, 12), (1, 64, 16)])
def test_sparse_attention_hands_it_what_it_takes(length: int, start: int, value_dim: int) -> None:
    random = torch.Generator().manual_seed(0)
    q = torch.randn(length, 4, 16, generator=random)
    keys = torch.randn(start + length, 2, 16, generator=random)
    values = torch.randn(start + length, 2, value_dim, generator=random)
    blocks = (start + length - 1) // 16
    centroids = keys[: blocks * 16].view(blocks, 16, 2, 16).mean(dim=1)
    chosen = choose_blocks(q, centroids, start, 16, 2)
    attended = attend_sparse(q, keys, values, start, 0.25, chosen, 16, select_varlen("cuda"))
    assert torch.allclose(attended, attend_sparse(q, keys, values, start, 0.25, chosen, 16, attend_varlen), atol=1e-6)


def test_without_the_library_cuda_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError, match="flash_attn"):
        select_varlen("cuda")
