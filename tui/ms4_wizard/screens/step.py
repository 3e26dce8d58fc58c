"""The screen of a step: its questions, and the memory plan beside them."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.screen import Screen
from textual.widgets import Button, Footer, Input

from ms4_wizard.flow import Flow, Go
from ms4_wizard.questions import STEPS
from ms4_wizard.widgets.answer import Answer
from ms4_wizard.widgets.plan import PlanPanel
from ms4_wizard.widgets.title import Title


class StepScreen(Screen[None]):
    """Asks the questions of one step."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+n", "next", "Next"),
        Binding("escape", "back", "Back"),
    ]

    def __init__(self, flow: Flow, number: int) -> None:
        super().__init__()
        self.flow = flow
        self.number = number
        self.step = STEPS[number]
        self._shown: set[str] = set()
        """Fields whose faults are shown: those that were touched, and all after Next."""

    def compose(self) -> ComposeResult:
        yield Title(self.step.title, self.number)
        with Horizontal(id="body"):
            with VerticalScroll(id="questions", can_focus=False):
                for question in self.step.questions:
                    yield Answer(question, self.flow.draft)
            with VerticalScroll(id="side", can_focus=False):
                yield PlanPanel(id="plan")
        with Horizontal(id="buttons"):
            yield Button("Back", id="back", disabled=self.number == 0, compact=True)
            yield Button("Next", id="next", variant="primary", compact=True)
        yield Footer()

    def on_screen_resume(self) -> None:
        """Another screen may have changed what this one shows: the plan, what is asked."""
        self._refresh()
        # Giving the first control the focus scrolled to it before there was a layout, and its
        # question out of sight.
        self.call_after_refresh(self.query_one("#questions").scroll_home, animate=False)

    @on(Answer.Changed)
    def _changed(self, event: Answer.Changed) -> None:
        self._shown.add(event.question.field)
        self._refresh()

    def _refresh(self) -> None:
        faults = self.flow.faults()
        for answer in self.query(Answer):
            question = answer.question
            answer.display = self.flow.draft.asks(question)
            shown = question.field in self._shown
            answer.show_fault(faults.get(question.field, "") if shown else "")
        self.query_one(PlanPanel).show(self.flow.cost())

    @on(Input.Submitted)
    def _submitted(self) -> None:
        self.focus_next()

    @on(Button.Pressed, "#next")
    def action_next(self) -> None:
        """Go on, if the answers of this step are good."""
        asked = [a for a in self.query(Answer) if self.flow.draft.asks(a.question)]
        self._shown |= {answer.question.field for answer in asked}
        self._refresh()
        faults = self.flow.faults(files=True)
        for answer in asked:
            if message := faults.get(answer.question.field):
                answer.show_fault(message)
        wrong = [answer for answer in asked if answer.question.field in faults]
        if wrong:
            wrong[0].query("Input, TextArea, Choices").first().focus()
            return
        self.post_message(Go(self.number + 1))

    @on(Button.Pressed, "#back")
    def action_back(self) -> None:
        """Go back; what was typed stays."""
        if self.number > 0:
            self.post_message(Go(self.number - 1))
