"""Training data: which files, and what they hold, looked at beside the screen."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.widget import Widget

from ms4.config import expand_home
from ms4_wizard.looking import Look
from ms4_wizard.paths import candidates
from ms4_wizard.screens.looking import LookingScreen
from ms4_wizard.screens.picker import PickerScreen
from ms4_wizard.steps import QUESTIONS
from ms4_wizard.widgets.data import DataPanel
from ms4_wizard.widgets.plan import LOW, PlanPanel


class DataScreen(LookingScreen):
    """Paths with a picker; format, counts, faults, lengths and samples as the model sees them."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+o", "pick", "Pick a file", priority=True),
        Binding("ctrl+x", "cancel", "Cancel or look again", show=False, priority=True),
    ]

    def compose_side(self) -> Iterable[Widget]:
        """The data, and the plan where there is room for both."""
        yield DataPanel(id="data")
        yield PlanPanel(id="plan")

    def show_look(self, look: Look | None) -> None:
        """The data; the plan only where there is room for both."""
        stops = self.flow.draft.get("data.faulty") != "drop"
        self.query_one(DataPanel).show(look, self.flow.unread(), stops)
        self.query_one("#plan").display = self.app.size.height >= LOW

    def action_pick(self) -> None:
        """Add a file by the picker; a path that is begun in the last line goes on there."""
        before = self.flow.draft.text(QUESTIONS["data.train"]).rstrip("\n").split("\n")
        begun = before[-1] if candidates(before[-1], Path.cwd()) else ""
        begun = "" if (Path.cwd() / expand_home(begun)).is_file() else begun

        def picked(path: str | None) -> None:
            if path is not None and self.flow.draft.can_be_typed(QUESTIONS["data.train"]):
                kept = before[:-1] if begun else before
                text = "\n".join([*filter(None, kept), path])
                self.flow.draft.answer(QUESTIONS["data.train"], text)
                self.answers_changed()

        self.app.push_screen(PickerScreen(begun), picked)

    def action_cancel(self) -> None:
        """Stop looking at the data, or look again."""
        looker, look = self.flow.looker, self.look
        if looker is None:
            return
        if look is not None and look.state == "reading":
            looker.cancel()
            self.look_changed()
        else:
            self.flow.look(self.app, again=True)
