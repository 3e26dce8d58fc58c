"""Progress over bytes, for a person at a terminal and for a log."""

from __future__ import annotations

import sys
import threading
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

PLAIN_PERIOD_S = 5.0
"""Seconds between two lines of progress where there is no terminal."""


def say(text: str) -> None:
    """One line for a person, on standard error."""
    print(text, file=sys.stderr, flush=True)


def gigabytes(size: int) -> str:
    """`size` in bytes as text in a readable decimal unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


class Display:
    """Where meters show how far they are. A context: on a terminal its bars stand together."""

    def __init__(self) -> None:
        self.bars: Progress | None = None
        if sys.stderr.isatty():
            self.bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )

    def __enter__(self) -> Display:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars is not None:
            self.bars.stop()


class Meter:
    """Progress over bytes: a bar on a terminal, a plain line now and then elsewhere. Threads may
    share it. A context, unless it stands in a display with others."""

    def __init__(
        self, label: str, total: int, done: int = 0, display: Display | None = None
    ) -> None:
        """`total` and `done` are bytes; `done` were there before."""
        self._label, self._total, self._done, self._before = label, total, done, done
        self._guard = threading.Lock()
        self._started = self._said = time.monotonic()
        self._display = display or Display()
        self._bars = self._display.bars
        if self._bars is not None:
            self._task = self._bars.add_task(label, total=total, completed=done)

    def __enter__(self) -> Meter:
        self._display.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._display.__exit__()

    def add(self, size: int) -> None:
        """Count `size` more bytes; a negative number takes back what must come again."""
        with self._guard:
            self._done += size
            if size < 0:
                self._before = min(self._before, self._done)
            if self._bars is not None:
                self._bars.update(self._task, completed=self._done)
                return
            now = time.monotonic()
            if now - self._said < PLAIN_PERIOD_S:
                return
            self._said = now
            rate = max(self._done - self._before, 1) / (now - self._started)
            say(
                f"{self._label}: {gigabytes(self._done)} of {gigabytes(self._total)}, "
                f"{gigabytes(int(rate))}/s, {(self._total - self._done) / rate / 60:.0f} min left"
            )
