"""What this machine can do at the most: the limits that benchmarks set their figures beside."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from perigee.kvstore.blocks import DType
from perigee.workers.attention.base import TORCH_DTYPES


def describe() -> dict[str, str | int]:
    """The machine and the versions that a figure was measured with."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def matmul_flops_per_s(dtype: DType, size: int = 2048) -> float:
    """Floating-point operations a second in the product of two square matrices, best of several."""
    a = torch.randn(size, size).to(TORCH_DTYPES[dtype])
    return 2 * size**3 / best_s(lambda: a @ a, repeats=8)


def memory_bytes_per_s(size_bytes: int = 1 << 30) -> float:
    """Bytes a second read from memory by a sum over an array much larger than the caches, best of several."""
    data = torch.ones(size_bytes // 4)
    return size_bytes / best_s(lambda: data.sum(), repeats=8)


def best_s(function: Callable[[], object], repeats: int) -> float:
    """The shortest of `repeats` runs in seconds, after one that does not count."""
    function()
    return min(_elapsed_s(function) for _ in range(repeats))


def _elapsed_s(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
