"""Light and dark: what both of the programs with screens share."""

from __future__ import annotations

from typing import ClassVar

from rich.terminal_theme import TerminalTheme
from textual.app import App
from textual.binding import Binding, BindingType

from ms4_wizard.preferences import Preferences

_INK = [
    (0, 0, 0),
    (168, 0, 28),
    (0, 92, 32),
    (112, 70, 0),
    (12, 74, 160),
    (134, 18, 118),
    (0, 84, 104),
    (90, 90, 90),
]
LIGHT = TerminalTheme((224, 224, 224), (0, 0, 0), [*_INK, (80, 80, 80)], _INK[1:])
"""What colours that are named (`yellow`) are on a light ground. Those that Textual takes are made
for white paper: on its grey panels, amber and green could hardly be read."""


class ThemedApp(App[list[str]]):
    """An app in light or dark, as it was chosen the last time."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+t", "toggle_theme", "Light or dark", show=False, priority=True),
    ]

    def __init__(self, preferences: Preferences | None = None) -> None:
        """
        Args:
            preferences: how the screens look; None: as they come, and not kept.
        """
        super().__init__()
        self._preferences = preferences
        self.ansi_theme_light = LIGHT

    def on_mount(self) -> None:
        """As it was chosen."""
        if self._preferences is not None:
            self.theme = self._preferences.theme()

    def action_toggle_theme(self) -> None:
        """Light or dark; it stays so the next time."""
        self.theme = "textual-light" if self.current_theme.dark else "textual-dark"
        if self._preferences is not None:
            self._preferences.save(self.theme)
