"""Disks that break, fill up or hang under a node that serves: the tier goes off, serving goes on."""

import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from perigee.kvstore import store_pb2 as pb
from perigee.kvstore.client import NoRoom, StoreClient
from tests.kvstore.conftest import NUM_SLOTS, HostedDirectory, RunningNode
from tests.kvstore.keys import ROOT, chain
from tests.kvstore.nodes import WAIT_S, config_of, get, put, running
from tests.kvstore.test_tiers import COLD, push_out


async def _assert_serves_without_ssd(node: RunningNode, client: StoreClient) -> None:
    assert await client.lookup(COLD) == [False] * len(COLD)
    (await put(client, chain("afterwards", NUM_SLOTS))).release()
    assert len(await get(client, chain("afterwards", NUM_SLOTS))) == NUM_SLOTS
    status = await node.status()
    assert status.ssd_state == pb.SSD_FAILED
    assert (status.orphaned_blocks, status.leased_blocks, status.reserved_blocks) == (0, 0, 0)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
async def test_a_disk_that_fails_under_writes_costs_no_request(
    tmp_path: Path,
    hosted_directory: HostedDirectory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    async with running(config_of(hosted_directory, tmp_path, "node", ssd=True), hosted_directory) as node:
        client = await node.connect()
        await push_out(node, client)
        monkeypatch.setattr(os, "pwritev", _failing(number))
        for prompt in range(6):
            (await put(client, chain(f"prompt {prompt}", 8))).release()
        while (await node.status()).ssd_state != pb.SSD_FAILED:
            pass
        await _assert_serves_without_ssd(node, client)
        await client.close()
    assert f"ssd tier off, serving goes on without it error=cannot write to {tmp_path}" in caplog.text
    assert os.strerror(number) in caplog.text


async def test_a_disk_that_fails_under_reads_is_a_miss(
    tmp_path: Path, hosted_directory: HostedDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(config_of(hosted_directory, tmp_path, "node", ssd=True), hosted_directory) as node:
        client = await node.connect()
        await push_out(node, client)
        monkeypatch.setattr(os, "preadv", _failing(errno.EIO))
        group = client.group()
        acquired = await group.acquire(COLD, ROOT, WAIT_S)
        assert (acquired.leased, len(acquired.reserved)) == ((), len(COLD))
        group.release()
        await _assert_serves_without_ssd(node, client)
        await client.close()


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
async def test_a_disk_that_hangs_holds_up_no_request_for_longer_than_its_timeout(
    tmp_path: Path, hosted_directory: HostedDirectory, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    answers = threading.Event()

    def hang(*_: object) -> int:
        answers.wait()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    config = config_of(hosted_directory, tmp_path, "node", ssd=True, ssd_timeout_s=2.0)
    async with running(config, hosted_directory) as node:
        client = await node.connect()
        await push_out(node, client)
        monkeypatch.setattr(os, call, hang)
        with _setting(answers):
            group = client.group()
            acquired = await group.acquire([*COLD, *chain("new", 4)], ROOT, WAIT_S)
            assert len(acquired.leased) + len(acquired.reserved) == len(COLD) + 4
            assert not acquired.leased or call == "pwritev"
            group.release()
            for number in itertools.count():
                if (await node.status()).ssd_state == pb.SSD_FAILED:
                    break
                (await put(client, chain(f"more {number}", 1))).release()
            # The slots that the hanging calls may touch are nobody else's until they have ended.
            with pytest.raises(NoRoom):
                await client.group().acquire(chain("all", NUM_SLOTS), ROOT, 0.0)
        await _assert_serves_without_ssd(node, client)
        await client.close()


@contextlib.contextmanager
def _setting(event: threading.Event) -> Iterator[None]:
    """Sets it at the end, however that comes: a node does not end before its disk's calls have."""
    try:
        yield
    finally:
        event.set()


def _failing(number: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail
