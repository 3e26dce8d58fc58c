"""What screens share that show what the data holds."""

from __future__ import annotations

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.timer import Timer

from ms4_wizard.costs import Cost
from ms4_wizard.looking import Look
from ms4_wizard.screens.samples import SamplesScreen
from ms4_wizard.screens.step import StepScreen

LOOK_AFTER = 0.6
"""Seconds without a key stroke before the data is looked at."""


class LookingScreen(StepScreen):
    """Looks at the data under the answers as they are, when the keys rest."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+e", "samples", "Samples", priority=True),
    ]
    _look_timer: Timer | None = None
    _offered = False
    """Whether samples are, as the footer has it: to make it anew at each key would be dear."""

    @property
    def look(self) -> Look | None:
        """What is known of the data."""
        return self.flow.looker.look if self.flow.looker is not None else None

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Samples are offered when there are any."""
        if action == "samples":
            return bool(self.look and self.look.samples)
        return super().check_action(action, parameters)

    def show_look(self, look: Look | None) -> None:
        """Draw what is known of the data."""
        raise NotImplementedError

    def show_extra(self, found: Cost | str) -> None:
        """What is known of the data; look at it when the keys rest."""
        self._show(self.look)
        if self._look_timer is not None:
            self._look_timer.stop()
        self._look_timer = self.set_timer(LOOK_AFTER, lambda: self.flow.look(self.app))

    def look_changed(self) -> None:
        """More is known of the data."""
        look = self.look
        if look is not None and look.state == "done":
            self.show_plan()  # the steps are known
        self._show(look)

    def _show(self, look: Look | None) -> None:
        self.show_look(look)
        offered = bool(look and look.samples)
        if offered != self._offered:
            self._offered = offered
            self.refresh_bindings()

    def action_samples(self) -> None:
        """Samples as the model sees them."""
        if self.look is not None and self.look.samples:
            self.app.push_screen(SamplesScreen(self.look.samples))
