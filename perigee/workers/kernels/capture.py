"""Records a step of the native kernels, so that one like it takes one call instead of several hundred.

What CUDA graphs do on a GPU, for the same reason: where a step has few tokens, the way from Python to each operation
takes as long as the operation. A record holds addresses, so a step that repeats it must put its inputs where they were
and take its results from where they are, and must be one for which no decision in Python would go another way.

While it is recorded, the memory of each result comes from a `Scratch` that outlives the record. Any operation but a
native kernel and a view makes the step one that can't be recorded: then it is only done. What Python reads out of a
tensor, by `tolist` or `numpy`, is not noticed: a step must not decide anything by that.
"""

import ctypes
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from perigee.workers.kernels.base import Captured

logger = logging.getLogger(__name__)

# In the order of `enum kernel` in native_src/replay.c.
KERNELS = (
    "perigee_linear",
    "perigee_copy_ends",
    "perigee_add_rms_norm",
    "perigee_gated_silu",
    "perigee_rotate_and_store",
    "perigee_rotate_and_store_latent",
    "perigee_route",
    "perigee_experts",
    "perigee_attend_paged",
)
_MAX_ARGUMENTS = 16
_COPIES = {torch.ops.aten.lift, torch.ops.aten.lift_fresh}  # of what Python had, though they look like views
_EMPTY = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty}

Function = Callable[..., Any]


class _Call(ctypes.Structure):
    """`call` in native_src/replay.c."""

    _fields_ = (("kernel", ctypes.c_int64), ("args", ctypes.c_int64 * _MAX_ARGUMENTS), ("real", ctypes.c_float))


class Scratch:
    """Memory for what recorded steps compute on the way. A piece is free again as soon as no tensor lies in it.

    So a layer's results lie where those of the layer before it did, as they would without a record, and in the cache.
    All records share it: what one leaves in a piece that another uses too must be read before that one is replayed.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray[Any, np.dtype[np.uint8]]] = []

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A dense tensor of anything."""
        size = int(np.prod(shape)) * dtype.itemsize
        piece = min((piece for piece in self._free if piece.nbytes >= size), key=len, default=None)
        if piece is None:
            # Powers of two, so that later steps with other sizes find use for it.
            piece = torch.empty(1 << (size - 1).bit_length(), dtype=torch.uint8).numpy()
        else:
            self._free = [other for other in self._free if other is not piece]
        lent = piece[:size]
        weakref.finalize(lent, lambda: self._free.append(piece))
        return torch.from_numpy(lent).view(dtype).view(tuple(shape))


class Recorder:
    """Stands in for the library while a step is recorded. Its calls' memory is the caller's to keep."""

    def __init__(self, library: ctypes.CDLL, signatures: Mapping[str, Sequence[Any]]) -> None:
        self._library = library
        self._signatures = signatures
        self._calls: list[_Call] = []
        self._foreign = ""  # the first operation that is not one to record

    def __getattr__(self, name: str) -> Function:
        function: Function = getattr(self._library, name)
        if name not in KERNELS:
            self.refuse(name)
            return function
        kernel, has_real = KERNELS.index(name), self._signatures[name][-1] is ctypes.c_float

        def call(*arguments: Any) -> Any:
            numbers = arguments[:-1] if has_real else arguments
            made = _Call(kernel, tuple(int(number or 0) for number in numbers), arguments[-1] if has_real else 0.0)
            self._calls.append(made)
            return function(*arguments)

        return call

    def refuse(self, operation: str) -> None:
        """Notes that a step with this operation can't be recorded."""
        self._foreign = self._foreign or operation

    @contextmanager
    def watching(self, scratch: Scratch) -> Iterator[None]:
        """Within it, torch takes memory from `scratch`, and what else it does is noted."""
        with _Watch(scratch, self.refuse):
            yield

    def captured(self) -> Captured | None:
        """What was recorded, if all of it could be."""
        if self._foreign:
            logger.info("step not recorded operation=%s", self._foreign)
            return None
        return _Captured(self._library, self._calls)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Sees every operation of torch."""

    def __init__(self, scratch: Scratch, refuse: Callable[[str], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._scratch = scratch
        self._refuse = refuse

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in _EMPTY:
            return self._scratch.tensor(out.shape, out.dtype)
        if func._schema.is_mutable or func.overloadpacket in _COPIES or not _is_view(out, args):
            self._refuse(str(func))
        return out


def _is_view(out: Any, args: tuple[Any, ...]) -> bool:
    results = out if isinstance(out, list | tuple) else [out]
    origin = args[0].untyped_storage().data_ptr() if args and isinstance(args[0], Tensor) else None
    return all(isinstance(each, Tensor) and each.untyped_storage().data_ptr() == origin for each in results)


class _Captured:
    """See `Captured`."""

    def __init__(self, library: ctypes.CDLL, calls: Sequence[_Call]) -> None:
        self._replay = library.perigee_replay
        self._calls = (_Call * len(calls))(*calls)

    def replay(self) -> None:
        if self._replay(self._calls, len(self._calls)):
            raise MemoryError(f"no memory for a step of {len(self._calls)} operations")
