"""How fast the SSD tier moves blocks, beside bare direct I/O of the same sizes by the same threads in the same run."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from perigee.kvstore.blocks import KEY_BYTES, PREFILL, BlockKey
from perigee.kvstore.dram import Arena, Mapping, allocate
from perigee.kvstore.records import Location, Record, SegmentFormat, fitting_segment_bytes
from perigee.kvstore.segments import SegmentFile, failing_as_tier
from perigee.kvstore.ssd import SegmentLog

_TAG = b"bench"
_ROOT = BlockKey(bytes(KEY_BYTES))
_MAX_ARENA_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class _Rig:
    """A log that the blocks of `keys` fill to the last place, and a file as large. The slots are used in turn."""

    log: SegmentLog
    bare: SegmentFile
    arena: Arena
    threads: ThreadPoolExecutor
    keys: list[BlockKey]

    def slot(self, index: int) -> memoryview:
        return self.arena.payload(index % self.arena.num_slots)


def measure_ssd(
    folder: Path, block_bytes: int, *, total_bytes: int = 512 << 20, num_threads: int = 4, repeats: int = 5
) -> dict[str, float]:
    """GB/s of `read`, `write`, `bare_read` and `bare_write`: ours and bare in turn, the best of `repeats` each.

    Every run moves about `total_bytes` in blocks of `block_bytes`, a multiple of 4096. Needs a little over twice that
    on the disk of `folder`, in which nothing is left behind. A first run of each, which also makes the reserved space
    real, does not count. Raises TierFailed if the disk fails.
    """
    segment_bytes = fitting_segment_bytes(block_bytes, total_bytes)
    num_segments = max(1, total_bytes // segment_bytes)
    num_blocks = num_segments * SegmentFormat(block_bytes, segment_bytes, _TAG).records_per_segment
    arena_bytes = max(block_bytes, min(_MAX_ARENA_BYTES, num_blocks * block_bytes))
    with failing_as_tier("write in", folder):
        scratch_folder = tempfile.TemporaryDirectory(dir=folder)
    with (
        scratch_folder as scratch,
        contextlib.closing(Mapping(allocate(arena_bytes), arena_bytes)) as mapping,
        contextlib.closing(_open_log(Path(scratch), block_bytes, num_segments, segment_bytes)) as log,
        contextlib.closing(SegmentFile(Path(scratch) / "bare")) as bare,
        ThreadPoolExecutor(num_threads) as threads,
    ):
        bare.preallocate(num_blocks * block_bytes)
        arena = Arena(mapping, block_bytes)
        _fill(arena)
        keys = [BlockKey(index.to_bytes(KEY_BYTES, "little")) for index in range(num_blocks)]
        return _best(_Rig(log, bare, arena, threads, keys), num_blocks * block_bytes, repeats)


def _open_log(folder: Path, block_bytes: int, num_segments: int, segment_bytes: int) -> SegmentLog:
    return SegmentLog.open(
        folder,
        slot_bytes=block_bytes,
        capacity_bytes=num_segments * segment_bytes,
        segment_bytes=segment_bytes,
        namespace=_TAG,
    )


def _fill(arena: Arena) -> None:
    """With bytes that no disk could compress."""
    for slot in range(arena.num_slots):
        arena.payload(slot)[:] = os.urandom(arena.slot_bytes)


def _best(rig: _Rig, run_bytes: int, repeats: int) -> dict[str, float]:
    rounds = [_round(rig) for _ in range(repeats + 1)][1:]
    return {name: run_bytes / min(times[name] for times in rounds) / 1e9 for name in rounds[0]}


def _round(rig: _Rig) -> dict[str, float]:
    """Seconds of each run. Ends with the log as empty as it was."""
    locations: dict[int, Location] = {}

    def write(index: int) -> None:
        key = rig.keys[index]
        locations[index] = rig.log.append(Record(key, _ROOT, num_tokens=1, origin=PREFILL), rig.slot(index))

    def read(index: int) -> None:
        # The log verifies that it reads what was written, so each block goes to where it came from.
        rig.log.read(locations[index], rig.keys[index], rig.slot(index))

    size = rig.arena.slot_bytes
    indices = range(len(rig.keys))
    times = {
        "bare_write": _run(rig, indices, lambda index: rig.bare.write([rig.slot(index)], index * size)),
        "write": _run(rig, indices, write),
        "bare_read": _run(rig, indices, lambda index: rig.bare.read([rig.slot(index)], index * size)),
        "read": _run(rig, indices, read),
    }
    for segment in range(rig.log.num_segments):
        rig.log.drop(segment)
    return times


def _run(rig: _Rig, indices: Iterable[int], move: Callable[[int], object]) -> float:
    started = time.perf_counter()
    for _ in rig.threads.map(move, indices):
        pass
    return time.perf_counter() - started
