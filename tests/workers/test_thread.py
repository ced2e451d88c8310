"""The thread that an engine has to itself."""

from pathlib import Path

import pytest
import torch

from perigee.workers.kernels.build import NativeUnavailable, library
from perigee.workers.thread import EngineThread
from tests.workers.engines import engine


async def test_native_kernels_have_as_many_threads_as_torch(tiny_llama: Path) -> None:
    try:
        count = library().omp_get_max_threads
    except NativeUnavailable as unavailable:
        pytest.skip(str(unavailable))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        thread = EngineThread(engine(tiny_llama), lambda result: None)
        thread.start()
        assert await thread.call(count) == 3
        await thread.stop()
    finally:
        torch.set_num_threads(before)
