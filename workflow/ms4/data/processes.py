"""Processes that answer requests, each over a pipe of its own.

`concurrent.futures.ProcessPoolExecutor` has one pipe for the answers of all. A process that is
killed in the middle of a large answer leaves the rest of it to be waited for, by a reader that
nothing wakes: the other processes hold the pipe open. Here a killed process closes its pipe.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
Answer = TypeVar("Answer")


class ProcessKilled(Exception):
    """A process ended before it had answered."""


class Processes(Generic[P, Answer]):
    """So many forked processes; each does one call at a time. Use it as a context manager."""

    def __init__(self, count: int, work: Callable[P, Answer]) -> None:
        """Fork them, before a thread of the caller's could hold a lock that they then wait for.

        Args:
            count: processes.
            work: what they do. It sees what the caller's memory holds now; later arguments and
                results are sent.
        """
        # What is there is not collected in them: to look at it would copy the pages that it is on.
        gc.freeze()
        context = get_context("fork")
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        self._processes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._idle.put(ours)
        gc.unfreeze()
        self._threads = ThreadPoolExecutor(count)

    def __enter__(self) -> Processes[P, Answer]:
        return self

    def __exit__(self, *error: object) -> None:
        """End them, whatever they are doing."""
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().close()
        for process in self._processes:
            process.join()
            process.close()

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> Future[Answer]:
        """Begin a call as soon as a process is idle.

        The future raises what the call raises, and `ProcessKilled` if its process was killed.
        """
        return self._threads.submit(self._ask, args, kwargs)

    def _ask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answer:
        connection = self._idle.get()
        try:
            connection.send((args, kwargs))
            answer, error = connection.recv()
        except (EOFError, OSError) as closed:
            raise ProcessKilled from closed
        finally:
            self._idle.put(connection)
        if error is not None:
            raise error
        result: Answer = answer
        return result


def _serve(connection: Connection, work: Callable[..., Any], parent: int) -> None:
    def watch() -> None:
        # Pipes of a killed parent stay open in the processes that were forked later.
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the caller ends them.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=watch, daemon=True).start()
    while True:
        try:
            args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            answer, error = work(*args, **kwargs), None
        except Exception as raised:  # noqa: BLE001 - the caller's to handle
            raised.add_note(f"in a process of its own:\n{traceback.format_exc()}")
            answer, error = None, raised
        connection.send((answer, error))
