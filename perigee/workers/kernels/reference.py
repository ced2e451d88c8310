"""The kernels in plain torch: any dtype, any device, differentiable. What the native ones are held against."""

from torch import Tensor
from torch.nn import functional as F

from perigee.workers.kernels.base import DecodeBatch


class TorchKernels:
    """See `Kernels`."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def add_rms_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x if delta is None else x + delta
        return total, F.rms_norm(total, weight.shape, weight, eps)

    def gated_silu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def rotate_and_store(
        self, qkv: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor, keys: Tensor, values: Tensor, num_heads: int
    ) -> Tensor:
        tokens, total_heads, _ = qkv.shape
        rotated_heads = (total_heads + num_heads) // 2  # all but the values
        rotated = rotate(qkv[:, :rotated_heads], *rope)
        keys.index_copy_(0, rows, rotated[:, num_heads:].reshape(tokens, -1))
        values.index_copy_(0, rows, qkv[:, rotated_heads:].reshape(tokens, -1))
        return rotated[:, :num_heads]

    def attend_decode(self, q: Tensor, keys: Tensor, values: Tensor, batch: DecodeBatch) -> Tensor | None:
        return None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each head of x [tokens, heads, head_dim], whose halves are the real and imaginary parts. The sines of the
    first half come negated, so that this takes one roll and no sign flip."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin
