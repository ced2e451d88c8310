"""Builds `kernels.c` for this machine, once, and calls it.

The library is kept beside the converted checkpoints and named by its source, so a new version builds anew. Compiling
takes two seconds; a machine without a compiler or without the instructions runs the torch kernels instead.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from perigee.workers.kernels.base import DecodeBatch, Rope
from perigee.workers.kernels.reference import TorchKernels

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_INSTRUCTIONS = {"avx512f", "avx512bw", "avx512vl", "avx512_bf16"}

# A context is cut in parts of at least this many tokens while there are fewer tasks than it takes to keep threads busy.
_PART_TOKENS = 256

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_SIGNATURES = {
    "perigee_linear": [_POINTER] * 4 + [_LONG] * 3,
    "perigee_add_rms_norm": [_POINTER] * 5 + [_LONG] * 2 + [_FLOAT],
    "perigee_gated_silu": [_POINTER] * 2 + [_LONG] * 2,
    "perigee_rotate_and_store": [_POINTER] * 7 + [_LONG] * 4,
    "perigee_attend_paged": [_POINTER] * 6 + [_LONG] * 10 + [_FLOAT],
}


class NativeUnavailable(Exception):
    """This machine can't build or run the native kernels. The message says why."""


class NativeKernels(TorchKernels):
    """bfloat16 on the CPU, for inference. What a native kernel does not cover goes to torch."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._linear = library.perigee_linear
        self._linear_rows: int = library.perigee_linear_rows()
        self._add_rms_norm = library.perigee_add_rms_norm
        self._gated_silu = library.perigee_gated_silu
        self._rotate_and_store = library.perigee_rotate_and_store
        self._attend_paged = library.perigee_attend_paged

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows, width = x.shape
        if rows > self._linear_rows or width % 32:
            return super().linear(x, weight, bias)
        x = x.contiguous()
        out = x.new_empty(rows, len(weight))
        bias_at = None if bias is None else bias.data_ptr()
        self._linear(x.data_ptr(), weight.data_ptr(), bias_at, out.data_ptr(), rows, len(weight), width)
        return out

    def add_rms_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        rows, width = x.shape
        if width % 16:
            return super().add_rms_norm(x, delta, weight, eps)
        x, normed = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        if delta is None:
            total, delta_at = x, None
        else:
            delta = delta.contiguous()
            total, delta_at = torch.empty_like(x), delta.data_ptr()
        pointers = (x.data_ptr(), delta_at, weight.data_ptr(), total.data_ptr(), normed.data_ptr())
        self._add_rms_norm(*pointers, rows, width, eps)
        return total, normed

    def gated_silu(self, gate_up: Tensor) -> Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        if width % 16 or not gate_up.is_contiguous():
            return super().gated_silu(gate_up)
        out = gate_up.new_empty(rows, width)
        self._gated_silu(gate_up.data_ptr(), out.data_ptr(), rows, width)
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
        self._rotate_and_store(*(t.data_ptr() for t in tensors), tokens, num_heads, kv_heads, head_dim)
        return q

    def attend_decode(self, q: Tensor, keys: Tensor, values: Tensor, batch: DecodeBatch, scale: float) -> Tensor | None:
        sequences, heads, head_dim = q.shape
        kv_heads = keys.shape[1] // head_dim
        value_dim = values.shape[1] // kv_heads
        q, out = q.contiguous(), q.new_empty(sequences, heads, value_dim)
        tensors = (q, keys, values, batch.pages, batch.contexts, out)
        strides = (keys.stride(0), values.stride(0))
        shape = (sequences, heads, kv_heads, head_dim, value_dim, *strides, batch.page_tokens, batch.pages.shape[1])
        parts = _parts(batch.longest, sequences * kv_heads)
        done = self._attend_paged(*(t.data_ptr() for t in tensors), *shape, parts, scale)
        return out if done == 0 else None


@cache
def load() -> NativeKernels:
    """The native kernels, built if need be. Raises NativeUnavailable."""
    try:
        library = ctypes.CDLL(str(_build()))
    except OSError as error:
        raise NativeUnavailable(str(error)) from error
    for name, signature in _SIGNATURES.items():
        getattr(library, name).argtypes = signature
    return NativeKernels(library)


def _parts(longest: int, tasks: int) -> int:
    wanted = -(-4 * torch.get_num_threads() // tasks)
    return max(1, min(wanted, longest // _PART_TOKENS))


def _build() -> Path:
    """The library for this source, compiler flags and processor; compiled unless it is there."""
    missing = _INSTRUCTIONS - _cpu_flags()
    if missing:
        raise NativeUnavailable(f"the processor lacks {', '.join(sorted(missing))}")
    identity = SOURCE.read_bytes() + " ".join((*_FLAGS, *sorted(_cpu_flags()))).encode()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perigee" / "kernels"
    library = folder / f"{hashlib.sha256(identity).hexdigest()[:24]}.so"
    if not library.exists():
        _compile(library)
    return library


def _compile(library: Path) -> None:
    """Compiles to a sibling first, so that processes that start together each find a whole library or none."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise NativeUnavailable("there is no C compiler")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [compiler, *_FLAGS, "-o", str(made), str(SOURCE), "-lm"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            raise NativeUnavailable(f"{compiler} failed: {done.stdout.strip()[:500]}")
        made.replace(library)
    logger.info("kernels built library=%s", library)


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), ":")
    return frozenset(flags.partition(":")[2].split())
