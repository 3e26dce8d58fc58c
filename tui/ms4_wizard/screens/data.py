"""Training data: which files, and what they hold, looked at beside the screen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.timer import Timer
from textual.widget import Widget

from ms4_wizard.costs import Cost
from ms4_wizard.screens.picker import PickerScreen
from ms4_wizard.screens.samples import SamplesScreen
from ms4_wizard.screens.step import StepScreen
from ms4_wizard.steps import QUESTIONS
from ms4_wizard.widgets.data import DataPanel
from ms4_wizard.widgets.plan import PlanPanel

LOOK_AFTER = 0.6
"""Seconds without a key stroke before the data is looked at."""


class DataScreen(StepScreen):
    """Paths with a picker; format, counts, faults, lengths and samples as the model sees them."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+o", "pick", "Pick a file", priority=True),
        Binding("ctrl+e", "samples", "Samples", priority=True),
        Binding("ctrl+x", "cancel", "Cancel or look again", show=False, priority=True),
    ]
    _look_timer: Timer | None = None

    def compose_side(self) -> Iterable[Widget]:
        """The data, and the plan where there is room for both."""
        yield DataPanel(id="data")
        yield PlanPanel(id="plan")

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Samples are offered when there are any."""
        if action == "samples":
            look = self.flow.looker.look if self.flow.looker is not None else None
            return bool(look and look.samples)
        return super().check_action(action, parameters)

    def show_extra(self, found: Cost | str) -> None:
        """What is known of the data; look at it when the keys rest."""
        self.look_changed()
        if self._look_timer is not None:
            self._look_timer.stop()
        self._look_timer = self.set_timer(LOOK_AFTER, lambda: self.flow.look(self.app))

    def look_changed(self) -> None:
        """More is known of the data."""
        look = self.flow.looker.look if self.flow.looker is not None else None
        self.query_one(DataPanel).show(look)
        if look is not None and look.state == "done":
            self.show_plan()  # the steps are known
        self.query_one("#plan").display = self.app.size.height >= 30
        self.refresh_bindings()

    def action_pick(self) -> None:
        """Add a file by the picker."""
        self.app.push_screen(PickerScreen(), self._picked)

    def _picked(self, path: str | None) -> None:
        question = QUESTIONS["data.train"]
        if path is not None and self.flow.draft.can_be_typed(question):
            before = self.flow.draft.text(question).rstrip("\n")
            self.flow.draft.answer(question, f"{before}\n{path}" if before else path)
            self.answers_changed()

    def action_samples(self) -> None:
        """Samples as the model sees them."""
        look = self.flow.looker.look if self.flow.looker is not None else None
        if look is not None and look.samples:
            self.app.push_screen(SamplesScreen(look.samples))

    def action_cancel(self) -> None:
        """Stop looking at the data, or look again."""
        looker = self.flow.looker
        if looker is None:
            return
        if looker.look is not None and looker.look.state == "reading":
            looker.cancel()
            self.look_changed()
        else:
            self.flow.look(self.app, again=True)
