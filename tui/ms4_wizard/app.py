"""The wizard's screens, one after the other."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import App
from textual.binding import Binding, BindingType

from ms4_wizard import costs
from ms4_wizard.flow import Flow, Go
from ms4_wizard.questions import STEPS
from ms4_wizard.screens.review import ReviewScreen
from ms4_wizard.screens.step import StepScreen
from ms4_wizard.widgets.plan import PlanPanel


class WizardApp(App[list[str]]):
    """Asks, shows what it costs, and writes the project; returns what to say then, or None."""

    ENABLE_COMMAND_PALETTE = False
    CSS_PATH = "wizard.tcss"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (70, "-wide")]  # noqa: RUF012 - as Textual has it
    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+q", "quit", "Quit", priority=True)]

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def on_mount(self) -> None:
        """A new project begins with the first question, one that exists with all its answers.

        The first frame does not wait for nvidia-smi."""
        if not costs.machine_is_known():
            self.run_worker(self._look_at_the_machine, thread=True)
        self.push_screen(ReviewScreen(self.flow) if self.flow.opened else StepScreen(self.flow, 0))

    def _look_at_the_machine(self) -> None:
        costs.look_at_the_machine()
        self.call_from_thread(self._show_the_plan)

    def _show_the_plan(self) -> None:
        # The answer may be there before the screen is: that will find the machine known.
        for panel in self.screen.query(PlanPanel):
            panel.show(self.flow.cost())

    @on(Go)
    def _go(self, event: Go) -> None:
        last = event.number >= len(STEPS)
        screen = ReviewScreen(self.flow) if last else StepScreen(self.flow, event.number)
        self.switch_screen(screen)
