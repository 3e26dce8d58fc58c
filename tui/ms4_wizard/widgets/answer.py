"""A question with the control that takes its answer."""

from __future__ import annotations

from typing import Any

from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Input, Static, TextArea

from ms4.errors import printable
from ms4_wizard.questions import Draft, Question
from ms4_wizard.widgets.choices import Choices


class Answer(Vertical):
    """A question: what is asked, advice, the control, and what is wrong with the answer.

    Each change goes to the draft at once: leaving a screen loses nothing."""

    class Changed(Message):
        """The draft has a new answer."""

        def __init__(self, question: Question) -> None:
            super().__init__()
            self.question = question

    def __init__(self, question: Question, draft: Draft) -> None:
        super().__init__(id=f"answer-{question.field.replace('.', '-')}")
        self.question = question
        self._draft = draft

    def compose(self) -> ComposeResult:
        yield Static(self.question.ask, classes="ask", markup=False)
        yield Static(self.question.advice, classes="advice", markup=False)
        control = self._control()
        if not self._draft.can_be_typed(self.question):
            control.disabled = True
            yield Static(
                "It holds characters that cannot be typed here: change it in an answers file.",
                classes="advice",
            )
        yield control
        yield Static("", classes="fault", markup=False)

    def _control(self) -> Widget:
        question, draft = self.question, self._draft
        value: Any = draft.get(question.field)
        match question.form:
            case "text":
                text = printable(draft.text(question))
                return Input(text, select_on_focus=False, compact=True)
            case "lines" | "named_lines":
                text = printable(draft.text(question))
                return TextArea(text, tab_behavior="focus", compact=True)
            case "choice":
                return Choices(question.choices, [value], several=False)
            case "several":
                return Choices(question.choices, value or (), several=True)

    def show_fault(self, message: str) -> None:
        """Show what is wrong under the control, or nothing."""
        fault = self.query_one(".fault", Static)
        fault.update(message)
        fault.display = bool(message)

    def _take(self, text: str) -> None:
        # Controls report what they begin with, too.
        if text != printable(self._draft.text(self.question)):
            self._draft.answer(self.question, text)
            self._answered()

    def _answered(self) -> None:
        self.post_message(self.Changed(self.question))

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        self._take(event.value)

    @on(TextArea.Changed)
    def _written(self, event: TextArea.Changed) -> None:
        event.stop()
        self._take(event.text_area.text)

    @on(Choices.Chosen)
    def _chosen(self, event: Choices.Chosen) -> None:
        event.stop()
        several = self.question.form == "several"
        self._draft.set(self.question.field, event.values if several else event.values[0])
        self._answered()
