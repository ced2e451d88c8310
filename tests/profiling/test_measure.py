"""What comes of a measurement that fails."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from perigee.configuration import ConfigurationError
from perigee.profiling.command import run
from perigee.profiling.config import ProfileConfig
from perigee.profiling.errors import ProfilingError
from perigee.profiling.measure import Bench, Effort


async def test_what_fails_beside_busy_neighbours_is_told_as_it_is() -> None:
    bench = Bench(Effort(max_tokens=64, repeats=1, seconds=1.0), np.random.default_rng(0))
    with pytest.raises(ProfilingError, match="worker d0: its stream broke"):
        async with bench.occupied([]):
            raise ProfilingError("worker d0: its stream broke")


@pytest.mark.parametrize("field", ["output", "json"])
def test_a_file_that_cannot_be_written_is_refused_before_the_cluster_is_asked(field: str, tmp_path: Path) -> None:
    files = {"output": str(tmp_path / "profile.yaml"), "json_file": "-"}
    files |= {"output" if field == "output" else "json_file": "/nowhere/file"}
    with pytest.raises(ConfigurationError, match=f"^--{field}: '/nowhere/file' cannot be written; allowed is a file"):
        asyncio.run(run(ProfileConfig.model_validate({"url": "http://127.0.0.1:1", **files})))
    assert not list(tmp_path.iterdir())
