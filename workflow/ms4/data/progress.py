"""How far a long read is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

QUIET_S = 3.0
"""Work that is done within so many seconds shows nothing."""
LINE_EVERY_S = 15.0
"""Seconds between two plain lines: a log stays readable."""


class ByteProgress:
    """Shows how many of `total` bytes are done; use it as a context manager."""

    def __init__(
        self,
        title: str,
        total: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = title
        self._total = max(total, 1)
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._done = 0
        self._next = clock() + QUIET_S
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Note that `count` more bytes are done."""
        self._done += count
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done)
            return
        now = self._clock()
        if now < self._next:
            return
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn(self._title),
                BarColumn(),
                TextColumn("{task.percentage:.0f} %"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(self._title, total=self._total, completed=self._done)
            self._bar.start()
            return
        self._next = now + LINE_EVERY_S
        self._console.print(f"{self._title}: {self._done / self._total:.0%} read", highlight=False)
