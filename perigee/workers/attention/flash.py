"""FlashAttention on CUDA, behind the interface of `varlen`. Imported only where it is used: see the extra `[gpu]`."""

from torch import Tensor
from torch.nn import functional as F

from perigee.workers.attention.varlen import Varlen, attend_varlen


def select_varlen(device_type: str) -> Varlen:
    """What attends over packed sequences on this kind of device. Raises ImportError on CUDA without flash-attn."""
    return _flash() if device_type == "cuda" else attend_varlen


def _flash() -> Varlen:
    from flash_attn import flash_attn_varlen_func

    def attend(
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
    ) -> tuple[Tensor, Tensor]:
        padded = pad_values(v, q.shape[-1])
        out, logsum, _ = flash_attn_varlen_func(
            q,
            k,
            padded,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            softmax_scale=softmax_scale,
            causal=causal,
            return_attn_probs=True,
        )
        return out[..., : v.shape[-1]], logsum

    return attend


def pad_values(v: Tensor, dim: int) -> Tensor:
    """`v` [keys, heads, value_dim] with zeros up to `dim`: the kernels want keys and values of one size."""
    return F.pad(v, (0, dim - v.shape[-1]))
