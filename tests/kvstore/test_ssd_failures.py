"""What the segment log does on disks that are small, missing, in use, refusing or broken."""

import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from perigee.kvstore import segments
from perigee.kvstore.errors import TierFailed
from tests.kvstore.conftest import StartPython
from tests.kvstore.keys import key
from tests.kvstore.ssd_log import (
    PER_SEGMENT,
    SEGMENT,
    SLOT,
    OpenLog,
    append,
    fill,
    payload,
    read,
    record,
    recovered,
    slot,
)


def test_a_folder_has_one_user_at_a_time(open_log: OpenLog, tmp_path: Path, start_python: StartPython) -> None:
    log = open_log()
    append(log, "a")
    with pytest.raises(TierFailed, match="another store node uses it"):
        open_log()
    script = f"""
from pathlib import Path
from perigee.kvstore.errors import TierFailed
from perigee.kvstore.ssd import SegmentLog
try:
    SegmentLog.open(Path({str(tmp_path)!r}), slot_bytes={SLOT}, capacity_bytes={3 * SEGMENT}, segment_bytes={SEGMENT},
                    namespace=b"model")
except TierFailed as error:
    print(error)
"""
    assert "another store node uses it" in start_python(script).communicate()[0]
    log.close()
    assert len(open_log().recovered) == 1


def test_a_missing_folder_is_not_made(open_log: OpenLog, tmp_path: Path) -> None:
    with pytest.raises(TierFailed, match="missing/lock: No such file or directory"):
        open_log(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


def test_a_capacity_below_one_segment_is_refused(open_log: OpenLog) -> None:
    with pytest.raises(TierFailed, match=f"capacity_bytes: 5; allowed is at least one segment of {SEGMENT}"):
        open_log(num_segments=0)


def _mount(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from _mount(tmp_path / "disk", f"size={2 * SEGMENT // 1024}k")


@pytest.fixture
def readonly_disk(tmp_path: Path) -> Iterator[Path]:
    yield from _mount(tmp_path / "disk", "ro")


def test_a_disk_too_small_for_the_capacity_is_told_and_left_as_it_was(small_disk: Path, open_log: OpenLog) -> None:
    log = open_log(small_disk, num_segments=1)
    append(log, "a")
    log.close()
    with pytest.raises(TierFailed, match="No space left on device"):
        open_log(small_disk)
    assert sum(path.stat().st_blocks * 512 for path in small_disk.iterdir()) <= SEGMENT
    assert set(recovered(open_log(small_disk, num_segments=1))) == {key("a")}


def test_a_read_only_disk_is_told(readonly_disk: Path, open_log: OpenLog) -> None:
    with pytest.raises(TierFailed, match="lock: Read-only file system"):
        open_log(readonly_disk)


def test_a_folder_without_permission_is_told(tmp_path: Path, start_python: StartPython) -> None:
    tmp_path.chmod(0o555)
    script = f"""
import os
from pathlib import Path
from perigee.kvstore.errors import TierFailed
from perigee.kvstore.ssd import SegmentLog
if os.geteuid() == 0:
    os.setuid(65534)
try:
    SegmentLog.open(Path({str(tmp_path)!r}), slot_bytes={SLOT}, capacity_bytes={SEGMENT}, segment_bytes={SEGMENT},
                    namespace=b"model")
except TierFailed as error:
    print(error)
"""
    assert "Permission denied" in start_python(script).communicate()[0]


def test_a_file_size_limit_is_told(tmp_path: Path, start_python: StartPython) -> None:
    script = f"""
import resource
from pathlib import Path
from perigee.kvstore.errors import TierFailed
from perigee.kvstore.ssd import SegmentLog
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    SegmentLog.open(Path({str(tmp_path)!r}), slot_bytes={SLOT}, capacity_bytes={SEGMENT}, segment_bytes={SEGMENT},
                    namespace=b"model")
except TierFailed as error:
    print(error)
"""
    assert "File too large" in start_python(script).communicate()[0]


def _replace_descriptors(path: Path, by: str) -> None:
    """Lets this process's descriptors of a file refer to another one, as if the disk had become that."""
    other = os.open(by, os.O_RDWR)
    for link in Path("/proc/self/fd").iterdir():
        if os.path.realpath(link) == str(path):
            os.dup2(other, int(link.name))
    os.close(other)


def test_a_disk_that_fills_up_fails_the_append_and_not_what_is_there(open_log: OpenLog, tmp_path: Path) -> None:
    log = open_log()
    written = fill(log, "a", PER_SEGMENT)
    _replace_descriptors(tmp_path / "segment-000001", "/dev/full")
    with pytest.raises(TierFailed, match=r"cannot write to .*segment-000001: No space left on device"):
        append(log, "b")
    assert all(read(log, name, at) == payload(name) for name, at in written.items())


def test_a_disk_that_breaks_fails_reads_and_drops(
    open_log: OpenLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log()
    written = fill(log, "a", PER_SEGMENT)

    def broken(*_: object) -> int:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(os, "preadv", broken)
    monkeypatch.setattr(os, "pwritev", broken)
    with pytest.raises(TierFailed, match=r"cannot read from .*segment-000000: Input/output error"):
        read(log, "a0", written["a0"])
    with pytest.raises(TierFailed, match="Input/output error"):
        log.drop(0)
    with pytest.raises(TierFailed, match="Input/output error"):
        append(log, "b")


def test_a_closed_log_fails_and_touches_nothing(open_log: OpenLog) -> None:
    log = open_log()
    location = append(log, "a")
    log.close()
    log.close()
    for use in (lambda: append(log, "b"), lambda: read(log, "a", location), lambda: log.drop(1)):
        with pytest.raises((TierFailed, ValueError)):
            use()


def test_a_file_system_without_direct_io_works_too_and_is_logged(
    open_log: OpenLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.open

    def refusing(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, os.strerror(22))
        return real(path, flags, mode)

    monkeypatch.setattr(segments.os, "open", refusing)
    with caplog.at_level(logging.INFO, logger="perigee.kvstore.ssd"):
        log = open_log()
        location = append(log, "a")
    assert read(log, "a", location) == payload("a")
    assert [entry.levelname for entry in caplog.records] == ["WARNING", "INFO"]
    assert "without direct I/O" in caplog.messages[0]
    assert "records=0 torn=0 corrupt=0" in caplog.messages[1]


def test_system_calls_that_stop_early_are_continued(open_log: OpenLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log()
    pwritev, preadv = os.pwritev, os.preadv
    page = 4096
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: pwritev(fd, [buffers[0][:page]], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:page]], offset))
    locations = log.append_batch([(record(name), slot(payload(name))) for name in "xyz"])
    assert [read(log, name, at) for name, at in zip("xyz", locations, strict=True)] == [payload(n) for n in "xyz"]
