"""The wizard's screens, one after the other."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import App
from textual.binding import Binding, BindingType

from ms4_wizard.flow import Flow, Go
from ms4_wizard.questions import STEPS
from ms4_wizard.screens.review import ReviewScreen
from ms4_wizard.screens.step import StepScreen


class WizardApp(App[list[str]]):
    """Asks, shows what it costs, and writes the project; returns what to say then, or None."""

    TITLE = "ms4-wizard"
    ENABLE_COMMAND_PALETTE = False
    CSS_PATH = "wizard.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+q", "quit", "Quit", priority=True)]

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def on_mount(self) -> None:
        """A new project begins with the first question, one that exists with all its answers."""
        self.push_screen(ReviewScreen(self.flow) if self.flow.opened else StepScreen(self.flow, 0))

    @on(Go)
    def _go(self, event: Go) -> None:
        last = event.number >= len(STEPS)
        screen = ReviewScreen(self.flow) if last else StepScreen(self.flow, event.number)
        self.switch_screen(screen)
