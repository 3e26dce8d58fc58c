"""Processes that answer: what they return, and what is heard of one that is killed."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil
import pytest

from ms4.data.processes import Processes, ProcessKilled
from ms4.errors import Ms4Error
from tests.commands import wait_for


def test_answers_in_any_order() -> None:
    base = 100  # known to the processes as it is when they are forked

    def work(number: int, *, times: int) -> tuple[int, int]:
        time.sleep(0.01 * (number % 3))
        return base + number * times, os.getpid()

    with Processes(3, work) as pool:
        answers = [future.result() for future in [pool.submit(n, times=2) for n in range(40)]]
    assert [value for value, _ in answers] == [100 + 2 * number for number in range(40)]
    processes = {process for _, process in answers}
    assert 1 <= len(processes) <= 3
    assert not processes & {os.getpid(), *psutil.pids()}


def test_errors_come_back() -> None:
    def work(text: str) -> int:
        if text == "ours":
            raise Ms4Error("no such thing")
        return int(text)

    with Processes(1, work) as pool:
        with pytest.raises(Ms4Error, match="no such thing"):
            pool.submit("ours").result()
        with pytest.raises(ValueError, match="invalid literal") as caught:
            pool.submit("x").result()
        assert "in a process of its own" in caught.value.__notes__[0]
        assert pool.submit("7").result() == 7


def test_killed_while_it_works() -> None:
    def work(_: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with Processes(2, work) as pool:
        for future in [pool.submit(number) for number in range(5)]:
            with pytest.raises(ProcessKilled):
                future.result(timeout=60)


def test_killed_while_it_answers() -> None:
    """An answer of many times what a pipe holds is cut off in its middle."""
    size = 64 << 20

    def work(delay: float) -> bytes:
        answer = bytes(size)
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return answer

    cut = 0
    for delay in (0.0, 0.002, 0.004, 0.008, 0.016):
        with Processes(2, work) as pool:
            try:
                assert len(pool.submit(delay).result(timeout=60)) == size
            except ProcessKilled:
                cut += 1
    assert cut


def test_ended_while_they_work() -> None:
    before = {child.pid for child in psutil.Process().children()}
    with Processes(2, time.sleep) as pool:
        futures = [pool.submit(600) for _ in range(4)]
        wait_for(lambda: futures[0].running(), "the first call")
        started = [child.pid for child in psutil.Process().children() if child.pid not in before]
        assert len(started) == 2
    assert all(future.done() for future in futures)
    assert not any(psutil.pid_exists(process) for process in started)
