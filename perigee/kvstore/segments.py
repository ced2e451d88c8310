"""Files of the SSD tier: preallocated, and read and written past the page cache straight from and to arena slots."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from perigee.kvstore.errors import TierFailed

_REFUSES_DIRECT_IO = (errno.EINVAL, errno.EOPNOTSUPP)


@contextlib.contextmanager
def failing_as_tier(doing: str, path: Path) -> Iterator[None]:
    """Turns an OSError into TierFailed, which says what could not be done to which path and why."""
    try:
        yield
    except OSError as error:
        raise TierFailed(f"cannot {doing} {path}: {error.strerror or error}") from error


class _Vectored(Protocol):
    """`os.preadv` and `os.pwritev`."""

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int, /) -> int: ...


class SegmentFile:
    """One file. Reads and writes are positional and block; any number of threads may make them at once.

    With direct I/O buffers start on a page; all sizes and offsets are multiples of `blocks.ALIGNMENT` anyway. All
    methods raise TierFailed if the operating system does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with failing_as_tier("open", path):
            self._fd, self.is_direct = _open(path)

    def size_bytes(self) -> int:
        with failing_as_tier("look at", self.path):
            return os.fstat(self._fd).st_size

    def empty(self) -> None:
        """Gives the space back; what was there reads as zeros once the file is preallocated again."""
        with failing_as_tier("empty", self.path):
            os.ftruncate(self._fd, 0)

    def preallocate(self, size_bytes: int) -> None:
        """Reserves the space, so that a full disk shows now and not while blocks are written. Keeps what is there."""
        with failing_as_tier(f"reserve {size_bytes} bytes for", self.path):
            os.ftruncate(self._fd, size_bytes)
            os.posix_fallocate(self._fd, 0, size_bytes)

    def read(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills the buffers one after the other. Returns how many bytes came: fewer only at the end of the file."""
        return self._transfer("read from", os.preadv, buffers, offset)

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Writes the buffers one after the other, all of them."""
        done = self._transfer("write to", os.pwritev, buffers, offset)
        if done < sum(buffer.nbytes for buffer in buffers):
            raise TierFailed(f"cannot write to {self.path}: no byte more after {done} at {offset}")

    def close(self) -> None:
        """No read or write may be under way. Those that come later raise TierFailed."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    def _transfer(self, doing: str, call: _Vectored, buffers: Sequence[memoryview], offset: int) -> int:
        """One system call, and more only if it stops early."""
        total = sum(buffer.nbytes for buffer in buffers)
        done = 0
        with failing_as_tier(doing, self.path):
            while done < total:
                moved = call(self._fd, _after(buffers, done), offset + done)
                if moved == 0:
                    break
                done += moved
        return done


def _after(buffers: Sequence[memoryview], done: int) -> Sequence[memoryview]:
    """What is left of the buffers after their first `done` bytes."""
    if done == 0:
        return buffers
    left = []
    for buffer in buffers:
        if done < buffer.nbytes:
            left.append(buffer[done:])
        done = max(0, done - buffer.nbytes)
    return left


def _open(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether it is for direct I/O."""
    flags = os.O_RDWR | os.O_CREAT
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600), True
    except OSError as error:
        if error.errno not in _REFUSES_DIRECT_IO:
            raise
        return os.open(path, flags, 0o600), False


def lock(folder: Path) -> int:
    """Makes this process the only one that uses `folder`, until the descriptor that it returns is closed.

    Raises TierFailed if another one does already, or if there is no such folder or no writing in it. The folder is
    never made here: one that is missing may be a disk that is not mounted, and what lies below is not to be filled.
    """
    path = folder / "lock"
    with failing_as_tier("open", path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        in_use = isinstance(error, BlockingIOError)
        raise TierFailed(f"cannot lock {path}: {'another store node uses it' if in_use else error.strerror}") from error
    return fd
