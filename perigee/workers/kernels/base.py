"""What a model asks of its kernels."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """One query each of several sequences, over the paged pool."""

    pages: Tensor  # [sequences, pages] int32, padded at the end
    contexts: Tensor  # [sequences] int64: tokens that each query sees, itself included
    page_tokens: int
    longest: int  # of the contexts


class Kernels(Protocol):
    """Operations on dense tensors of one dtype. None changes its inputs, but `rotate_and_store` fills the pool."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [tokens, in] with weight [out, in]: [tokens, out]."""
        ...

    def add_rms_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(x + delta, its RMS norm scaled by weight), each [tokens, width]. Without a delta the sum is x itself."""
        ...

    def gated_silu(self, gate_up: Tensor) -> Tensor:
        """silu of the first half of gate_up [tokens, 2 width] times the second: [tokens, width]."""
        ...

    def rotate_and_store(
        self, qkv: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor, keys: Tensor, values: Tensor, num_heads: int
    ) -> Tensor:
        """Rotates queries and keys by their positions, and writes keys and values to their rows of the pool.

        qkv: [tokens, heads + 2 kv_heads, head_dim]; rope: cos and sin, each [tokens, 1, head_dim]; keys, values:
        [rows, kv_heads * head_dim]. Returns the queries, [tokens, heads, head_dim].
        """
        ...

    def attend_decode(self, q: Tensor, keys: Tensor, values: Tensor, batch: DecodeBatch) -> Tensor | None:
        """Attention of q [sequences, heads, head_dim] over the pool; None if this shape is not one for it."""
        ...
