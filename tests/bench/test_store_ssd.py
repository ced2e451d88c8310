from pathlib import Path

import pytest

from perigee.bench.store_ssd import measure_ssd
from perigee.kvstore.errors import TierFailed


@pytest.mark.parametrize("block_bytes", [4096, 128 << 10, 2 << 20])
def test_all_four_speeds_are_measured_and_nothing_is_left(tmp_path: Path, block_bytes: int) -> None:
    speeds = measure_ssd(tmp_path, block_bytes, total_bytes=1 << 20, repeats=1)
    assert speeds.keys() == {"read", "write", "bare_read", "bare_write"}
    assert all(speed > 0 for speed in speeds.values())
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(TierFailed, match="missing"):
        measure_ssd(tmp_path / "missing", 4096)
