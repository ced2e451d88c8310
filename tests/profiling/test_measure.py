"""What comes of a measurement that fails."""

import numpy as np
import pytest

from perigee.profiling.errors import ProfilingError
from perigee.profiling.measure import Bench, Effort


async def test_what_fails_beside_busy_neighbours_is_told_as_it_is() -> None:
    bench = Bench(Effort(max_tokens=64, repeats=1, seconds=1.0), np.random.default_rng(0))
    with pytest.raises(ProfilingError, match="worker d0: its stream broke"):
        async with bench.occupied([]):
            raise ProfilingError("worker d0: its stream broke")
