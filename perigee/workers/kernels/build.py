"""Builds the C sources for this machine, once.

The library is kept beside the converted checkpoints and named by its sources, so a new version builds anew. `make` does
it when it installs; where it did not, the first start takes three seconds more. A machine without a compiler or without
the instructions runs the torch kernels instead.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).with_name("native_src")
_FLAGS = ("-O2", "-march=native", "-fopenmp", "-fPIC")
_INSTRUCTIONS = {"avx512f", "avx512bw", "avx512vl", "avx512_bf16"}


class NativeUnavailable(Exception):
    """This machine can't build or run the native kernels. The message says why."""


@cache
def library(*, tiles: bool = True) -> ctypes.CDLL:
    """The library for these sources, compiler flags and processor; compiled unless it is there.

    Without `tiles` it leaves the processor's matrix unit (AMX) alone. Raises NativeUnavailable.
    """
    missing = _INSTRUCTIONS - _cpu_flags()
    if missing:
        raise NativeUnavailable(f"the processor lacks {', '.join(sorted(missing))}")
    flags = _FLAGS if tiles else (*_FLAGS, "-mno-amx-bf16")
    sources = sorted(FOLDER.glob("*.[ch]"))
    settings = " ".join((*flags, *sorted(_cpu_flags()))).encode()
    identity = hashlib.sha256(b"\0".join([*(source.read_bytes() for source in sources), settings]))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perigee" / "kernels"
    path = folder / f"{identity.hexdigest()[:24]}.so"
    if not path.exists():
        _compile(path, flags, [source for source in sources if source.suffix == ".c"])
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(str(error)) from error


def _compile(path: Path, flags: tuple[str, ...], sources: list[Path]) -> None:
    """Compiles to a sibling first, so that processes that start together each find a whole library or none."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise NativeUnavailable("there is no C compiler")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, ThreadPoolExecutor() as compilers:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        pairs = zip(sources, objects, strict=True)
        commands = [(compiler, *flags, "-c", "-o", str(made), str(source)) for source, made in pairs]
        list(compilers.map(_run, commands))
        made = Path(folder) / path.name
        _run((compiler, *flags, "-shared", "-o", str(made), *map(str, objects), "-lm"))
        made.replace(path)
    logger.info("kernels built library=%s", path)


def _run(command: tuple[str, ...]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise NativeUnavailable(f"{command[0]} failed: {done.stdout.strip()[:500]}")


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), ":")
    return frozenset(flags.partition(":")[2].split())
