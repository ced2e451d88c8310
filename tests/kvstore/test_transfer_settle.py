"""Memory that a thread still uses is not let go of."""

import asyncio
import threading

import pytest

from perigee.kvstore.transfer.settle import settle


async def test_waiting_for_a_thread_outlasts_any_number_of_cancellations() -> None:
    may_end = threading.Event()
    running = asyncio.get_running_loop().run_in_executor(None, may_end.wait, 60.0)
    settling = asyncio.create_task(settle(running))
    for _ in range(3):
        await asyncio.sleep(0)
        settling.cancel()
    await asyncio.sleep(0)
    assert not settling.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await settling
    assert running.done()
