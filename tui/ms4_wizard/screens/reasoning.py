"""Reasoning mode: what each effort does to this data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.timer import Timer
from textual.widget import Widget
from textual.widgets import Static

from ms4.errors import printable
from ms4_wizard.costs import Cost
from ms4_wizard.screens.data import LOOK_AFTER
from ms4_wizard.screens.samples import SamplesScreen
from ms4_wizard.screens.step import StepScreen
from ms4_wizard.widgets.data import efforts


class ReasoningScreen(StepScreen):
    """The data is read again under the chosen effort, and what comes of it is told."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+e", "samples", "Samples", priority=True),
    ]
    _look_timer: Timer | None = None

    def compose_extra(self) -> Iterable[Widget]:
        """What comes of the data."""
        yield Static("", id="effect", markup=False)

    def show_extra(self, found: Cost | str) -> None:
        """Look at the data under what is chosen now."""
        self.look_changed()
        if self._look_timer is not None:
            self._look_timer.stop()
        self._look_timer = self.set_timer(LOOK_AFTER, lambda: self.flow.look(self.app))

    def look_changed(self) -> None:
        """More is known of the data."""
        look = self.flow.looker.look if self.flow.looker is not None else None
        effect = self.query_one("#effect", Static)
        if look is not None and look.state == "done":
            self.show_plan()  # the steps are known
        if look is None:
            effect.update(Text("What it does to your data is told when that is named.", "dim"))
        elif look.state == "reading":
            effect.update(Text("Reading the data under this effort…", "dim"))
        elif not look.found:
            effect.update(Text(printable(look.error), "yellow"))
        else:
            text = Text("Your data, so read:\n", "bold")
            for line in efforts(look):
                text.append(f"  {line}\n", "")
            if lost := look.found["fault_count"]:
                text.append(f"  {lost:,} refused, such as\n", "red")
                text.append(f"  {printable(look.found['faults'][0])}\n", "red")
            text.append("Ctrl+E shows samples.", "dim")
            effect.update(text)

    def action_samples(self) -> None:
        """Samples as the model sees them."""
        look = self.flow.looker.look if self.flow.looker is not None else None
        if look is not None and look.samples:
            self.app.push_screen(SamplesScreen(look.samples))
