"""Reasoning mode: what each effort does to this data."""

from __future__ import annotations

from collections.abc import Iterable

from rich.text import Text
from textual.widget import Widget
from textual.widgets import Static

from ms4.errors import printable
from ms4_wizard.looking import Look
from ms4_wizard.screens.looking import LookingScreen
from ms4_wizard.widgets.data import efforts
from ms4_wizard.widgets.plan import warning


class ReasoningScreen(LookingScreen):
    """The data is read again under the chosen effort, and what comes of it is told."""

    def compose_extra(self) -> Iterable[Widget]:
        """What comes of the data."""
        yield Static("", id="effect", markup=False)

    def show_look(self, look: Look | None) -> None:
        """What comes of the data under what is chosen now."""
        effect = self.query_one("#effect", Static)
        if look is None:
            effect.update(Text("What it does to your data is told when that is named.", "dim"))
        elif look.state == "reading":
            effect.update(Text("Reading the data under this effort…", "dim"))
        elif not look.found:
            effect.update(warning(printable(look.error)))
        else:
            text = Text("Your data, so read:\n", "bold")
            for line in efforts(look):
                text.append(f"  {line}\n", "")
            if lost := look.found["fault_count"]:
                text.append(f"  {lost:,} refused, such as\n", "red")
                text.append(f"  {printable(look.found['faults'][0])}\n", "red")
            text.append("Ctrl+E shows samples.", "dim")
            effect.update(text)
