"""Processes that a command works with, when it is interrupted."""

import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import pytest

from perigee.replay.paper.interrupts import end_silently, held


def held_signals() -> set[int]:
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, set()))


def test_processes_that_are_started_meanwhile_hold_interrupts_back() -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with held():
            future = pool.submit(held_signals)
        assert signal.SIGINT in future.result()
    assert signal.SIGINT not in held_signals()


def test_an_interrupted_process_ends_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    with ProcessPoolExecutor(1, get_context("spawn"), end_silently) as pool:
        with held():
            future = pool.submit(signal.raise_signal, signal.SIGINT)
        with pytest.raises(BrokenProcessPool):
            future.result()
    assert capfd.readouterr().err == ""
