"""Progress of reading data: a bar, or plain lines, and only where it takes long."""

from __future__ import annotations

import io

from rich.console import Console

from ms4.data.progress import ByteProgress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(terminal: bool, seconds: float) -> str:
    """What a read of 10 lines shows if each takes so many seconds."""
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=80)
    with ByteProgress("conversations", 1000, console, clock) as progress:
        for _ in range(10):
            clock.now += seconds
            progress.advance(100)
    return out.getvalue()


def test_progress_is_shown_only_if_it_takes_long() -> None:
    assert shown(terminal=False, seconds=0.2) == ""
    assert shown(terminal=True, seconds=0.2) == ""
    lines = shown(terminal=False, seconds=5).splitlines()
    assert lines == [f"conversations: {share}% read" for share in (10, 40, 70, 100)]
    bar = shown(terminal=True, seconds=5)
    assert "conversations" in bar
    assert "100 %" in bar
