"""`ms4-wizard watch DIR`: the screen of a run alone."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from textual.binding import Binding, BindingType

from ms4_wizard.preferences import Preferences
from ms4_wizard.screens.run import RunScreen
from ms4_wizard.themes import ThemedApp
from ms4_wizard.watch.stages import Snapshot


def farewell(root: Path, last: Snapshot | None) -> list[str]:
    """What to say when the screen is closed.

    Args:
        root: the project, as the user named it.
        last: what was seen last.
    """
    if last is None:
        return []
    told = [f"The run in {root}: {last.says}."]
    if last.runner is not None:
        told.append(f"It goes on (Snakemake is process {last.runner}). To look at it again:")
        told.append(f"  ms4-wizard watch {shlex.quote(str(root))}")
    return told


class WatchApp(ThemedApp):
    """Shows a run; returns what to say afterwards."""

    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+q", "leave", "Leave", priority=True, show=False)
    ]

    def __init__(
        self,
        root: Path,
        profile: str,
        start: bool = False,
        now: Callable[[], float] = time.time,
        preferences: Preferences | None = None,
    ) -> None:
        super().__init__(preferences)
        self.root = root
        self.run_screen = RunScreen(root, profile, start, now)

    def on_mount(self) -> None:
        """There is only one screen."""
        self.push_screen(self.run_screen, self._leave)

    def _leave(self, last: Snapshot | None) -> None:
        self.exit(farewell(self.root, last))

    def action_leave(self) -> None:
        """Leave, whatever screen is on top."""
        self._leave(self.run_screen.seen)
