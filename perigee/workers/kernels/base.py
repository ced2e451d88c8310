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


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding at the positions of a step's tokens. The sines of the first half come negated."""

    cos: Tensor  # [tokens, 1, dim]
    sin: Tensor
    interleaved: bool  # pairs lie side by side in what is rotated, else in its two halves; the result has halves


@dataclass(frozen=True, slots=True)
class Chosen:
    """The experts that each token goes through. Shared ones, the last of the stack, get every token with weight 1."""

    experts: Tensor  # [tokens, chosen] int64, the routed ones
    weights: Tensor  # [tokens, chosen] float32
    num_shared: int


class Kernels(Protocol):
    """Operations on tensors of one dtype. None changes its inputs, but those named `..._and_store` fill the pool."""

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
        self, qkv: Tensor, rope: Rope, rows: Tensor, keys: Tensor, values: Tensor, num_heads: int
    ) -> Tensor:
        """Rotates queries and keys by their positions, and writes keys and values to their rows of the pool.

        qkv: [tokens, heads + 2 kv_heads, head_dim]; keys, values: [rows, kv_heads * head_dim]. Returns the queries,
        [tokens, heads, head_dim].
        """
        ...

    def rotate_and_store_latent(
        self, q: Tensor, latent: Tensor, norm: Tensor, eps: float, rope: Rope, rows: Tensor, latents: Tensor
    ) -> Tensor:
        """Rotates queries and the keys' shared part, and writes normalised latent and rotated key to the pool.

        q: [tokens, heads, nope_dim + rope_dim]; latent: [tokens, rank + rope_dim], before its norm, whose weight is
        `norm` [rank]; latents: [rows, rank + rope_dim]. Returns the queries, of q's shape.
        """
        ...

    def linear_heads(self, x: Tensor, weight: Tensor) -> Tensor:
        """A linear map a head: x [tokens, heads, in] with weight [heads, out, in]: [tokens, heads, out]."""
        ...

    def experts(self, x: Tensor, chosen: Chosen, gate_up: Tensor, down: Tensor) -> Tensor:
        """The weighted sum of what the chosen experts, gated MLPs, make of each token.

        x: [tokens, width]; gate_up: [experts, 2 intermediate, width]; down: [experts, width, intermediate]. Computes no
        expert for a token that did not choose it. Returns [tokens, width].
        """
        ...

    def attend_decode(self, q: Tensor, keys: Tensor, values: Tensor, batch: DecodeBatch, scale: float) -> Tensor | None:
        """Attention of q [sequences, heads, head_dim] over the pool; None if this shape is not one for it.

        keys: [rows, kv_heads * head_dim]; values: [rows, kv_heads * value_dim], perhaps a part of the keys' rows.
        Returns [sequences, heads, value_dim].
        """
        ...
