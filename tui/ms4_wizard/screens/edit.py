"""One answer, changed in place over the review."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Footer, Input, Static

from ms4_wizard.flow import Flow
from ms4_wizard.pages import page
from ms4_wizard.questions import Question
from ms4_wizard.screens.help import HelpScreen
from ms4_wizard.widgets.answer import Answer, HelpWanted
from ms4_wizard.widgets.plan import verdict


class EditScreen(ModalScreen[None]):
    """Asks one question again. Each change is kept; Escape goes back to the review."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "Done"),
        Binding("ctrl+n", "close", "Done", show=False),
        Binding("f1", "help", "Help", key_display="?/F1"),
        Binding("question_mark", "help", "Help", show=False),
    ]

    def __init__(self, flow: Flow, question: Question) -> None:
        super().__init__()
        self.flow = flow
        self._question = question

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="page", can_focus=False) as box:
            box.border_title = self._question.field
            yield Answer(self._question, self.flow.draft)
            yield Static("", id="fits", markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """The answer is in reach."""
        self.query_one(Answer).control.focus()
        self._refresh()

    @on(Answer.Changed)
    def _changed(self) -> None:
        self.flow.save()
        self._refresh()

    def _refresh(self) -> None:
        faults = self.flow.faults()
        self.query_one(Answer).show_fault(faults.get(self._question.field, ""))
        found = self.flow.cost()
        self.query_one("#fits", Static).update("" if isinstance(found, str) else verdict(found))

    @on(HelpWanted)
    def action_help(self) -> None:
        """The longer page."""
        self.app.push_screen(HelpScreen(page(self._question)))

    @on(Input.Submitted)
    def action_close(self) -> None:
        """Back to the review."""
        self.dismiss()
