"""The machine: what was found here, or another one to plan for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from textual import on, work
from textual.widget import Widget
from textual.widgets import Static

from ms4_wizard import machine
from ms4_wizard.costs import Cost
from ms4_wizard.flow import Flow
from ms4_wizard.machine import Known
from ms4_wizard.screens.step import StepScreen
from ms4_wizard.widgets.machine import MachineFacts, Targets
from ms4_wizard.widgets.plan import PlanPanel


class MachineScreen(StepScreen):
    """Which machine trains: this one, or one by its name."""

    def __init__(self, flow: Flow, number: int) -> None:
        super().__init__(flow, number)
        self._place = Path(flow.directory or ".").expanduser().absolute()

    def compose_extra(self) -> Iterable[Widget]:
        """The machines that can be planned for."""
        yield Static("Plan for (sets device and budget)", classes="ask")
        yield Targets(id="targets")

    def compose_side(self) -> Iterable[Widget]:
        """What this one has, above what the run takes."""
        yield MachineFacts(id="facts")
        yield PlanPanel(id="plan")

    def on_mount(self) -> None:
        """Programs of a cluster may take seconds: they are asked beside the screen."""
        self._show_machine()
        if Known.machine is None:
            self._find()

    @work(thread=True)
    def _find(self) -> None:
        Known.machine = machine.look()
        self.app.call_from_thread(self._show_machine)

    def _show_machine(self) -> None:
        if self.is_attached:
            found = Known.at(self._place)
            self.query_one(MachineFacts).show(found)
            self.query_one(Targets).show(found, self.flow.draft)

    def show_extra(self, found: Cost | str) -> None:
        """The mark follows the answers, and the facts the size of the terminal."""
        self.query_one(MachineFacts).show(Known.at(self._place))
        self.query_one(Targets).show(Known.machine, self.flow.draft)

    @on(Targets.Chosen)
    def _chosen(self, event: Targets.Chosen) -> None:
        for field, value in event.target.values.items():
            self.flow.draft.set(field, value)
        self.answers_changed()
