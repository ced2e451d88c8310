"""The DRAM tier: anonymous shared memory cut into fixed slots, which the node and every worker on its host map.

A memfd has no name in any file system, so it is gone when the last process that maps it is.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import threading

from perigee.kvstore.errors import StoreError

# Linux's number; Python's mmap module does not name it. Kernels before 5.14 answer EINVAL.
_MADV_POPULATE_WRITE = 23
_POPULATE_CHUNK_BYTES = 8 << 20  # a few milliseconds each, for which other threads wait


def allocate(size_bytes: int) -> int:
    """A descriptor of `size_bytes` of zeroed shared memory, whose size nobody it is passed to can change."""
    fd = os.memfd_create("perigee-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd


class Mapping:
    """The first `size_bytes` of shared memory in this process. Owns the descriptor `fd`."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self.fd = fd
        self.size_bytes = size_bytes
        self._map = mmap.mmap(fd, size_bytes)
        self._view = memoryview(self._map)
        self._lock = threading.Lock()
        self._closed = False

    def populate(self) -> None:
        """Makes every page present, so that no later access waits for the kernel. Takes seconds for many gigabytes.

        Runs in a thread of its own and ends early if the mapping is closed meanwhile. Raises StoreError if there is
        not enough memory.
        """
        for start in range(0, self.size_bytes, _POPULATE_CHUNK_BYTES):
            with self._lock:
                if self._closed:
                    return
                self._populate(start, min(_POPULATE_CHUNK_BYTES, self.size_bytes - start))

    def view(self, start: int, size_bytes: int) -> memoryview:
        """Writable bytes. They stay valid after `close` for as long as somebody refers to them."""
        return self._view[start : start + size_bytes]

    def close(self) -> None:
        """Gives up the descriptor and, once no view of it is left, the memory."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._view.release()
            with contextlib.suppress(BufferError):  # views are still out; the last one to go unmaps it
                self._map.close()
            os.close(self.fd)

    def _populate(self, start: int, size_bytes: int) -> None:
        try:
            self._map.madvise(_MADV_POPULATE_WRITE, start, size_bytes)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise StoreError(f"no memory for an arena of {self.size_bytes} bytes: {error}") from error
            self._touch(start, size_bytes)

    def _touch(self, start: int, size_bytes: int) -> None:
        """Reads and writes back a byte of each page: workers may be writing already."""
        for offset in range(start, start + size_bytes, mmap.PAGESIZE):
            self._view[offset] = self._view[offset]


class Arena:
    """`num_slots` slots of `slot_bytes` each: as many as fit into the mapping."""

    def __init__(self, mapping: Mapping, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.num_slots = mapping.size_bytes // slot_bytes
        self._mapping = mapping

    def payload(self, slot: int) -> memoryview:
        """The bytes of a slot, writable. Any thread may ask. Raises IndexError if there is no such slot."""
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot: {slot}; allowed are 0 to {self.num_slots - 1}")
        return self._mapping.view(slot * self.slot_bytes, self.slot_bytes)
