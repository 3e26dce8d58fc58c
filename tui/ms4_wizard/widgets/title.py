"""The first line of a screen."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widgets import Static

from ms4_wizard.steps import STEPS


class Title(Horizontal):
    """What the screen is about, and how far it is."""

    def __init__(self, title: str, number: int) -> None:
        super().__init__()
        self._title = title
        self._number = number

    def compose(self) -> ComposeResult:
        yield Static(f"ms4  ·  {self._title}", classes="what", markup=False)
        last = len(STEPS) + 1
        far = f"{self._number + 1} of {last}" if self._number < last else "written"
        yield Static(far, classes="how-far")
