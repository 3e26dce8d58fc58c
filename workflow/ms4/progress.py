"""Progress of a loop: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
LINE_EVERY_S = 10.0
"""Seconds between two plain lines."""


def track(items: Sequence[Item], label: str) -> Iterator[Item]:
    """Yield the items and show how far it is, on stderr."""
    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        ) as progress:
            yield from progress.track(items, description=label)
        return
    said = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - said >= LINE_EVERY_S:
            said = time.monotonic()
            print(f"{label}: {done} of {len(items)}", file=sys.stderr, flush=True)
        yield item
