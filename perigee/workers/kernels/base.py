"""What a model asks of its kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """One query each of several sequences, over the paged pool."""

    pages: Tensor  # [sequences, pages] int32, padded at the end
    contexts: Tensor  # [sequences] int64: tokens that each query sees, itself included
    page_tokens: int


@dataclass(frozen=True, slots=True)
class Matrix:
    """Weights [..., out, in] as the kernels that made it read them; if `packed`, `tensor` is theirs alone to read."""

    tensor: Tensor
    packed: bool = False


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding at the positions of a step's tokens. The sines of the first half come negated."""

    cos: Tensor  # [tokens, 1, dim]
    sin: Tensor
    interleaved: bool  # pairs lie side by side in what is rotated, else in its two halves; the result has halves


@dataclass(frozen=True, slots=True)
class Routing:
    """How a token chooses its experts (DeepSeek-V3, 2.1.2).

    `noaux_tc` adds a learned bias to the scores for the choice alone, and keeps the groups whose two best experts score
    highest; `group_limited_greedy` keeps those whose best one does; `greedy` knows no groups.
    """

    num_experts: int
    experts_per_token: int
    method: Literal["noaux_tc", "greedy", "group_limited_greedy"]
    scoring: Literal["sigmoid", "softmax"]
    num_groups: int
    groups_per_token: int
    normalise: bool  # the weights of a token's experts to a sum of 1, before the scaling
    scaling_factor: float

    @property
    def best_of_group(self) -> int:
        """How many of a group's experts decide whether the group is kept."""
        return 2 if self.method == "noaux_tc" else 1


@dataclass(frozen=True, slots=True)
class Chosen:
    """The experts that each token goes through. Shared ones, the last of the stack, get every token with weight 1."""

    experts: Tensor  # [tokens, chosen] int64, the routed ones
    weights: Tensor  # [tokens, chosen] float32
    num_shared: int


class Captured(Protocol):
    """The operations of a step, on the very tensors that it had. Who has it keeps these, and the kernels."""

    def replay(self) -> None:
        """Does them again, with what is in those tensors now. Raises MemoryError."""
        ...


class Kernels(Protocol):
    """Operations on tensors of one dtype. None changes its inputs, but those named `..._and_store` fill the pool."""

    def matrices(self, *weights: Tensor) -> tuple[Matrix, ...]:
        """Takes weights [..., out, in] over, which may be laid out anew where they lie: all of them alike."""
        ...

    def rows(self, matrix: Matrix, indices: Tensor) -> Tensor:
        """Rows of a matrix [out, in] as they were: [indices, in]."""
        ...

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
        """x [tokens, in] with a matrix [out, in]: [tokens, out]."""
        ...

    def logits(self, x: Tensor, matrix: Matrix) -> Tensor:
        """x [rows, in] with a matrix [out, in]: [rows, out], float32, and not rounded to x's dtype on the way where the
        kernels can: bfloat16 leaves so little of large logits that the best would often be one of several equals.
        """
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

    def linear_heads(self, x: Tensor, matrix: Matrix) -> Tensor:
        """A linear map a head: x [tokens, heads, in + rest] with a matrix [heads, out, in]. What follows the first `in`
        values of each head is kept as it is: [tokens, heads, out + rest].
        """
        ...

    def route(self, x: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
        """The weights, float32, and the experts that each of x [tokens, width] chooses: [tokens, experts_per_token].

        weight: [experts, width]; bias: [experts], float32. Scores are float32, and so are their sums.
        """
        ...

    def experts(self, x: Tensor, chosen: Chosen, gate_up: Matrix, down: Matrix) -> Tensor:
        """The weighted sum of what the chosen experts, gated MLPs, make of each token.

        x: [tokens, width]; gate_up: [experts, 2 intermediate, width]; down: [experts, width, intermediate]. Computes no
        expert for a token that did not choose it. Returns [tokens, width].
        """
        ...

    def attend_chunk(
        self, q: Tensor, keys: Tensor, values: Tensor, start: int, scale: float, shared_keys: Tensor | None = None
    ) -> Tensor | None:
        """Causal attention of q [length, heads, head_dim], whose positions begin at `start`; None if this shape is not
        one for it.

        keys: [start + length, kv_heads, own_dim]; values: [start + length, kv_heads, value_dim]; shared_keys:
        [start + length, rest of head_dim], which every head's keys end with. Returns [length, heads, value_dim].
        """
        ...

    def choose_blocks(self, q: Tensor, centroids: Tensor, start: int, block_size: int, count: int) -> Tensor:
        """See `choose_blocks` in `perigee.workers.attention.moba`."""
        ...

    def attend_sparse(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        start: int,
        scale: float,
        chosen: Tensor,
        block_size: int,
        shared_keys: Tensor | None = None,
    ) -> Tensor | None:
        """As `attend_chunk`, but a query sees its own block of `block_size` tokens, and of those before it the ones in
        `chosen` [length, heads, count] (-1 for none)."""
        ...

    def attend_decode(self, q: Tensor, keys: Tensor, values: Tensor, batch: DecodeBatch, scale: float) -> Tensor | None:
        """Attention of q [sequences, heads, head_dim] over the pool; None if this shape is not one for it.

        keys: [rows, kv_heads * head_dim]; values: [rows, kv_heads * value_dim], perhaps a part of the keys' rows.
        Returns [sequences, heads, value_dim].
        """
        ...

    def capture(self, step: Callable[[], None]) -> Captured | None:
        """Runs `step`, and notes its operations if all of them can be repeated, as CUDA graphs do on a GPU."""
        ...
