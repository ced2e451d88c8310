"""Each way to move blocks is measured on the same blocks. How fast any is, is not tested."""

import importlib.util

import pytest

from perigee.bench.store_transfer import measure_pull

pytestmark = pytest.mark.slow  # measures the machine


@pytest.mark.parametrize("block_bytes", [128 << 10, 2 << 20])
def test_every_way_that_is_installed_has_a_rate(block_bytes: int) -> None:
    rates = measure_pull(block_bytes, rounds=1, total_bytes=8 << 20)
    assert rates.pull > 0
    assert rates.bare_socket > 0
    assert (rates.mooncake is not None) == (importlib.util.find_spec("mooncake") is not None)
