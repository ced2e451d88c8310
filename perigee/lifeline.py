"""A pipe that tells processes that the one that started them is gone, however it ended.

The supervisor holds the only writing end and never writes: reading returns when the kernel closes it.
"""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

GRACE_S = 5.0


def hold(fd: int, run_directory: Path) -> None:
    """Ends this process when the supervisor behind `fd` is gone, and removes the run directory that it left.

    In a thread of its own, so that nothing that keeps the event loop busy can delay it.
    """
    threading.Thread(target=_end_with, args=(fd, run_directory), name="lifeline", daemon=True).start()


def _end_with(fd: int, run_directory: Path) -> None:
    os.read(fd, 1)
    # Every child does this, for the last one may be any of them.
    shutil.rmtree(run_directory, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)
