"""The kernels in C, for bfloat16 inference on the CPU. What one of them does not cover goes to torch."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perigee.workers.kernels.base import Captured, Chosen, DecodeBatch, Matrix, Rope, Routing
from perigee.workers.kernels.build import library
from perigee.workers.kernels.capture import Recorder, Scratch
from perigee.workers.kernels.reference import TorchKernels

# A context is cut in parts of at least this many tokens while there are fewer tasks than it takes to keep threads busy.
_PART_TOKENS = 256

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_SIGNATURES: dict[str, list[Any]] = {
    "perigee_pack": [_POINTER] + [_LONG] * 2,
    "perigee_linear": [_POINTER] * 4 + [_LONG] * 9,
    "perigee_copy_ends": [_POINTER] * 2 + [_LONG] * 4,
    "perigee_logits": [_POINTER] * 3 + [_LONG] * 3,
    "perigee_add_rms_norm": [_POINTER] * 5 + [_LONG] * 3 + [_FLOAT],
    "perigee_gated_silu": [_POINTER] * 2 + [_LONG] * 2,
    "perigee_rotate_and_store": [_POINTER] * 7 + [_LONG] * 4,
    "perigee_rotate_and_store_latent": [_POINTER] * 8 + [_LONG] * 8 + [_FLOAT],
    "perigee_route": [_POINTER] * 5 + [_LONG] * 9 + [_FLOAT],
    "perigee_experts": [_POINTER] * 6 + [_LONG] * 6,
    "perigee_attend_chunk": [_POINTER],
    "perigee_choose_blocks": [_POINTER] * 3 + [_LONG] * 8,
    "perigee_attend_sparse": [_POINTER] * 2 + [_LONG] * 2,
    "perigee_attend_paged": [_POINTER] * 6 + [_LONG] * 10 + [_FLOAT],
    "perigee_replay": [_POINTER, _LONG],
}


class _Chunk(ctypes.Structure):
    """`chunk` in native_src/flash.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("q", "keys", "shared_keys", "values", "out")),
        *((name, _LONG) for name in ("length", "start", "heads", "kv_heads", "d", "shared_d", "value_d")),
        *((name, _LONG) for name in ("key_stride", "key_head", "shared_stride", "value_stride", "value_head")),
        ("scale", _FLOAT),
    )


def _chunk(
    q: Tensor, keys: Tensor, values: Tensor, out: Tensor, start: int, scale: float, shared_keys: Tensor | None
) -> Any:
    """A pointer to a chunk that names these tensors, which the caller keeps."""
    (length, heads, head_dim), (_, kv_heads, value_dim) = q.shape, values.shape
    shared = keys[:, 0, :0] if shared_keys is None else shared_keys
    pointers = (t.data_ptr() for t in (q, keys, shared, values, out))
    shape = (length, start, heads, kv_heads, head_dim, shared.shape[1], value_dim)
    strides = (*keys.stride()[:2], shared.stride(0), *values.stride()[:2])
    return ctypes.byref(_Chunk(*pointers, *shape, *strides, scale))


class NativeKernels(TorchKernels):
    """Each method passes addresses, shapes and strides; `native_src` says what it makes of them."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        for name, signature in _SIGNATURES.items():
            getattr(functions, name).argtypes = signature
        self._native: ctypes.CDLL | Recorder = functions
        self._scratch = Scratch()

    # ---- matrices ------------------------------------------------------------------------------------------------

    def matrices(self, *weights: Tensor) -> tuple[Matrix, ...]:
        if any(w.shape[-2] % 16 or w.shape[-1] % 32 or not w.is_contiguous() for w in weights):
            return super().matrices(*weights)
        for weight in weights:
            width = weight.shape[-1]
            if self._native.perigee_pack(weight.data_ptr(), weight.numel() // width, width):
                raise MemoryError(f"no memory to pack a matrix of shape {list(weight.shape)}")
        return tuple(Matrix(weight, packed=True) for weight in weights)

    def rows(self, matrix: Matrix, indices: Tensor) -> Tensor:
        if not matrix.packed:
            return super().rows(matrix, indices)
        height, width = matrix.tensor.shape
        blocks = matrix.tensor.view(height // 16, width // 2, 16, 2)
        return blocks[indices // 16, :, indices % 16].flatten(1)

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
        if not matrix.packed:
            return super().linear(x, matrix, bias)
        if x.stride(1) != 1:
            x = x.contiguous()
        (tokens, width), outputs = x.shape, len(matrix.tensor)
        out = x.new_empty(tokens, outputs)
        bias_at = None if bias is None else bias.data_ptr()
        pointers = (x.data_ptr(), matrix.tensor.data_ptr(), bias_at, out.data_ptr())
        self._native.perigee_linear(*pointers, 1, tokens, outputs, width, x.stride(0), outputs, 0, 0, 0)
        return out

    def linear_heads(self, x: Tensor, matrix: Matrix) -> Tensor:
        if not matrix.packed:
            return super().linear_heads(x, matrix)
        x, weight = x.contiguous(), matrix.tensor
        (tokens, heads, total), (_, outputs, width) = x.shape, weight.shape
        rest = total - width
        out = x.new_empty(tokens, heads, outputs + rest)
        strides = (x.stride(0), out.stride(0), x.stride(1), out.stride(1), weight.stride(0))
        pointers = (x.data_ptr(), weight.data_ptr(), None, out.data_ptr())
        self._native.perigee_linear(*pointers, heads, tokens, outputs, width, *strides)
        if rest:
            self._native.perigee_copy_ends(x.data_ptr(), out.data_ptr(), tokens * heads, total, outputs + rest, rest)
        return out

    def logits(self, x: Tensor, matrix: Matrix) -> Tensor:
        if not matrix.packed:
            return super().logits(x, matrix)
        x = x.contiguous()
        (rows, width), outputs = x.shape, len(matrix.tensor)
        out = torch.empty(rows, outputs)
        self._native.perigee_logits(x.data_ptr(), matrix.tensor.data_ptr(), out.data_ptr(), rows, outputs, width)
        return out

    # ---- rows ----------------------------------------------------------------------------------------------------

    def add_rms_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        rows, width = x.shape
        if width % 16:
            return super().add_rms_norm(x, delta, weight, eps)
        if x.stride(1) != 1:
            x = x.contiguous()
        normed = x.new_empty(rows, width)
        if delta is None:
            total, delta_at = x, None
        else:
            delta = delta.contiguous()
            total, delta_at = x.new_empty(rows, width), delta.data_ptr()
        pointers = (x.data_ptr(), delta_at, weight.data_ptr(), total.data_ptr(), normed.data_ptr())
        self._native.perigee_add_rms_norm(*pointers, rows, width, x.stride(0), eps)
        return total, normed

    def gated_silu(self, gate_up: Tensor) -> Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        if width % 16 or not gate_up.is_contiguous():
            return super().gated_silu(gate_up)
        out = gate_up.new_empty(rows, width)
        self._native.perigee_gated_silu(gate_up.data_ptr(), out.data_ptr(), rows, width)
        return out

    def rotate_and_store(
        self, qkv: Tensor, rope: Rope, rows: Tensor, keys: Tensor, values: Tensor, num_heads: int
    ) -> Tensor:
        tokens, total_heads, head_dim = qkv.shape
        if head_dim % 32 or rope.interleaved or not qkv.is_contiguous():
            return super().rotate_and_store(qkv, rope, rows, keys, values, num_heads)
        q = qkv.new_empty(tokens, num_heads, head_dim)
        tensors = (qkv, rope.cos, rope.sin, rows, q, keys, values)
        kv_heads = (total_heads - num_heads) // 2
        self._native.perigee_rotate_and_store(*(t.data_ptr() for t in tensors), tokens, num_heads, kv_heads, head_dim)
        return q

    def rotate_and_store_latent(
        self, q: Tensor, latent: Tensor, norm: Tensor, eps: float, rope: Rope, rows: Tensor, latents: Tensor
    ) -> Tensor:
        (tokens, heads, head_dim), rank, rope_dim = q.shape, len(norm), rope.cos.shape[-1]
        dense = latent.stride(1) == 1 and q.stride()[1:] == (head_dim, 1)
        if rope_dim % 32 or rank % 16 or not dense:
            return super().rotate_and_store_latent(q, latent, norm, eps, rope, rows, latents)
        out = q.new_empty(q.shape)
        tensors = (q, latent, norm, rope.cos, rope.sin, rows, out, latents)
        shape = (tokens, heads, head_dim - rope_dim, rope_dim, rank, q.stride(0), latent.stride(0), rope.interleaved)
        self._native.perigee_rotate_and_store_latent(*(t.data_ptr() for t in tensors), *shape, eps)
        return out

    # ---- experts -------------------------------------------------------------------------------------------------

    def route(self, x: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
        (tokens, width), chosen = x.shape, routing.experts_per_token
        if width % 32 or not x.is_contiguous():
            return super().route(x, weight, bias, routing)
        experts = torch.empty(tokens, chosen, dtype=torch.int64)
        weights = torch.empty(tokens, chosen)
        pointers = (x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr())
        groups = (routing.num_groups, routing.groups_per_token, routing.best_of_group)
        options = (routing.scoring == "softmax", routing.normalise, routing.scaling_factor)
        shape = (tokens, width, len(weight), chosen, *groups)
        if self._native.perigee_route(*pointers, experts.data_ptr(), weights.data_ptr(), *shape, *options):
            return super().route(x, weight, bias, routing)
        return weights, experts

    def experts(self, x: Tensor, chosen: Chosen, gate_up: Matrix, down: Matrix) -> Tensor:
        if not (gate_up.packed and down.packed):
            return super().experts(x, chosen, gate_up, down)
        x = x.contiguous()
        out = torch.empty_like(x)
        tensors = (x, chosen.experts, chosen.weights, gate_up.tensor, down.tensor, out)
        num_experts, width, inter = down.tensor.shape
        shape = (len(x), chosen.experts.shape[1], chosen.num_shared, num_experts, width, inter)
        if self._native.perigee_experts(*(t.data_ptr() for t in tensors), *shape):
            raise MemoryError(f"no memory for the experts of {len(x)} tokens")
        return out

    # ---- attention -----------------------------------------------------------------------------------------------

    def attend_chunk(
        self, q: Tensor, keys: Tensor, values: Tensor, start: int, scale: float, shared_keys: Tensor | None = None
    ) -> Tensor | None:
        q, out = q.contiguous(), q.new_empty(*q.shape[:2], values.shape[2])
        done = self._native.perigee_attend_chunk(_chunk(q, keys, values, out, start, scale, shared_keys))
        return out if done == 0 else None

    def choose_blocks(self, q: Tensor, centroids: Tensor, start: int, block_size: int, count: int) -> Tensor:
        (length, heads, head_dim), (blocks, kv_heads, _) = q.shape, centroids.shape
        if head_dim % 32 or not blocks or not count:
            return super().choose_blocks(q, centroids, start, block_size, count)
        padded = -(-blocks // 32) * 32
        packed = q.new_zeros(kv_heads, padded, head_dim)
        # What blocks have in common ranks none of them, and would be all that bfloat16 has room for.
        packed[:, :blocks] = (centroids - centroids[:1]).transpose(0, 1)
        self.matrices(packed)
        q, chosen = q.contiguous(), torch.empty(length, heads, count, dtype=torch.int32)
        pointers = (q.data_ptr(), packed.data_ptr(), chosen.data_ptr())
        shape = (length, start, heads, kv_heads, head_dim, padded, block_size, count)
        if self._native.perigee_choose_blocks(*pointers, *shape):
            raise MemoryError(f"no memory for the gate of {length} tokens")
        return chosen

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
        q, out = q.contiguous(), q.new_empty(*q.shape[:2], values.shape[2])
        chunk, blocks = _chunk(q, keys, values, out, start, scale, shared_keys), chosen.int().contiguous()
        done = self._native.perigee_attend_sparse(chunk, blocks.data_ptr(), blocks.shape[2], block_size)
        return out if done == 0 else None

    def attend_decode(self, q: Tensor, keys: Tensor, values: Tensor, batch: DecodeBatch, scale: float) -> Tensor | None:
        sequences, heads, head_dim = q.shape
        kv_heads = keys.shape[1] // head_dim
        value_dim = values.shape[1] // kv_heads
        q, out = q.contiguous(), q.new_empty(sequences, heads, value_dim)
        tensors = (q, keys, values, batch.pages, batch.contexts, out)
        strides = (keys.stride(0), values.stride(0))
        shape = (sequences, heads, kv_heads, head_dim, value_dim, *strides, batch.page_tokens, batch.pages.shape[1])
        parts = _parts(batch.pages.shape[1] * batch.page_tokens, sequences * kv_heads)
        done = self._native.perigee_attend_paged(*(t.data_ptr() for t in tensors), *shape, parts, scale)
        return out if done == 0 else None

    # ---- whole steps ---------------------------------------------------------------------------------------------

    def capture(self, step: Callable[[], None]) -> Captured | None:
        functions = self._native
        assert isinstance(functions, ctypes.CDLL)
        recorder = Recorder(functions, _SIGNATURES)
        self._native = recorder
        try:
            with recorder.watching(self._scratch):
                step()
        finally:
            self._native = functions
        return recorder.captured()


def load(*, tiles: bool = True) -> NativeKernels:
    """The native kernels, built if need be, with the processor's matrix unit or without. Raises NativeUnavailable."""
    return NativeKernels(library(tiles=tiles))


def _parts(room: int, tasks: int) -> int:
    """Of contexts that page tables with `room` for so many tokens hold, for each of `tasks`."""
    wanted = -(-4 * torch.get_num_threads() // tasks)
    return max(1, min(wanted, room // _PART_TOKENS))
