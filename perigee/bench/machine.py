"""What this machine can do at the most: what the limits beside benchmarks' figures are made of."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from perigee.kvstore.blocks import DType
from perigee.workers.attention.base import TORCH_DTYPES


@dataclass(frozen=True, slots=True)
class MachineRates:
    """Operations a second in a large matrix product, and bytes a second read from memory."""

    matmul_flops_per_s: float
    memory_bytes_per_s: float

    @classmethod
    def measure(cls, dtype: DType, weight_bytes: int) -> "MachineRates":
        """The rates for a model of so many bytes, which the caches may hold in part: then they count."""
        return cls(matmul_flops_per_s(dtype), memory_bytes_per_s(weight_bytes))

    @classmethod
    def best(cls, rates: Sequence["MachineRates"]) -> "MachineRates":
        return cls(max(r.matmul_flops_per_s for r in rates), max(r.memory_bytes_per_s for r in rates))

    def as_json(self) -> dict[str, float]:
        return {
            "matmul_tflops_per_s": round(self.matmul_flops_per_s / 1e12, 3),
            "memory_gb_per_s": round(self.memory_bytes_per_s / 1e9, 1),
        }


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


def memory_bytes_per_s(size_bytes: int) -> float:
    """Bytes a second read by a sum over an array of so many bytes, 1 GiB at most, best of several."""
    data = torch.ones(min(size_bytes, 1 << 30) // 4)
    return data.nbytes / best_s(lambda: data.sum(), repeats=8)


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
