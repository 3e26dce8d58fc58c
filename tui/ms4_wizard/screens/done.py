"""The project is written: what to do next, or run it now."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.screen import Screen
from textual.widgets import Button, Footer, Static

from ms4.errors import printable
from ms4_wizard import writing
from ms4_wizard.answers import Answers
from ms4_wizard.steps import STEPS
from ms4_wizard.widgets.title import Title


class DoneScreen(Screen[None]):
    """Next commands; Enter leaves, `r` runs it here."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "leave", "Leave", show=False),
        Binding("r", "run", "Run it now"),
        Binding("escape", "back", "Back to the answers"),
        Binding("ctrl+q", "leave", "Leave", priority=True),
    ]

    def __init__(self, answers: Answers, directory: Path, told: list[str]) -> None:
        """
        Args:
            answers: what was written.
            directory: where.
            told: what the command prints after the screens.
        """
        super().__init__()
        self._answers = answers
        self._directory = directory
        self._told = told

    def compose(self) -> ComposeResult:
        yield Title("Done", len(STEPS) + 1)
        with VerticalScroll(id="done", can_focus=False):
            place = printable(str(self._directory))
            yield Static(Text(f"The project is in {place}.", "bold"))
            marks = ("written", "kept", "merged", "replaced")
            changed = [line for line in self._told if line.startswith(marks)]
            for line in changed:
                yield Static(Text(f"  {printable(line)}", "dim"))
            yield Static("\nTo run it, on this machine or on the cluster's login node:\n")
            for line in writing.next_commands(self._answers, self._directory):
                yield Static(Text(f"  {printable(line)}", "bold"))
            yield Static(
                "\nIt fetches, converts and checks the weights, packs the data, trains, evaluates "
                "and reports. Whatever breaks, the same command goes on from where it was.\n"
            )
            yield Static("To look at it while it runs, from anywhere:\n")
            yield Static(Text(f"  ms4-wizard watch {writing.quoted(self._directory)}", "bold"))
            yield Static("\nTo change an answer later:\n")
            yield Static(Text(f"  ms4-wizard {writing.quoted(self._directory)}", "bold"))
        with Horizontal(id="buttons"):
            yield Button("Run it now", id="run", compact=True)
            yield Button("Leave", id="leave", variant="primary", compact=True)
        yield Footer()

    def on_mount(self) -> None:
        """Enter leaves."""
        self.query_one("#leave").focus()

    @on(Button.Pressed, "#leave")
    def action_leave(self) -> None:
        """Leave; the command says where the project is."""
        self.app.exit(self._told)

    def action_back(self) -> None:
        """Back to the review: an answer can still be changed."""
        self.dismiss()

    @on(Button.Pressed, "#run")
    def action_run(self) -> None:
        """Run it on the run screen."""
        from ms4_wizard.screens.run import RunScreen

        profile = self._answers.where.run
        self.app.push_screen(RunScreen(self._directory.resolve(), start=True, profile=profile))
