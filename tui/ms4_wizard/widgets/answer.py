"""A question with the control that takes its answer."""

from __future__ import annotations

from typing import Any

from textual import events, on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Input, Static, TextArea

from ms4.errors import printable
from ms4_wizard.draft import Draft
from ms4_wizard.questions import LINES, Question
from ms4_wizard.widgets.choices import Choices

CONTROLS = "Input, TextArea, Choices"


class HelpWanted(Message):
    """`?` where it cannot be part of an answer."""


_EDITS = {
    "backspace": "delete_left",
    "delete": "delete_right",
    "left": "cursor_left",
    "right": "cursor_right",
}


async def _edit_in_turn(control: Widget, event: events.Key) -> None:
    """Let a key that edits do so at once. As a binding it would go round through the app first, and
    a letter that is typed right behind it would come before it."""
    if event.key in _EDITS:
        event.stop()
        event.prevent_default()
        await control.run_action(_EDITS[event.key])


class AnswerLines(TextArea):
    """Several lines of text."""

    async def on_key(self, event: events.Key) -> None:
        """Edit in the order of the keys."""
        await _edit_in_turn(self, event)


class AnswerInput(Input):
    """A line of text; `?` asks for help where an answer cannot hold it: in a number, and where
    nothing is typed yet."""

    def __init__(self, text: str, number: bool) -> None:
        super().__init__(text, select_on_focus=False, compact=True)
        self._number = number

    async def on_key(self, event: events.Key) -> None:
        """Take `?` before it is typed, and edit in the order of the keys."""
        if event.character == "?" and (self._number or not self.value):
            event.stop()
            event.prevent_default()
            self.post_message(HelpWanted())
        else:
            await _edit_in_turn(self, event)


class Answer(Vertical):
    """A question: what is asked, advice, the control, and what is wrong with the answer.

    Each change goes to the draft at once: leaving a screen loses nothing."""

    class Changed(Message):
        """The draft has a new answer."""

        def __init__(self, question: Question) -> None:
            super().__init__()
            self.question = question

    def __init__(self, question: Question, draft: Draft) -> None:
        row = question.form == "number"
        super().__init__(
            id=f"answer-{question.field.replace('.', '-')}", classes="row" if row else ""
        )
        self.question = question
        self._draft = draft
        self._taken = printable(draft.text(question))
        """The text of the control as the draft has it; typing goes ahead of it."""

    def compose(self) -> ComposeResult:
        control = self._control()
        ask = Static(self.question.ask, classes="ask", markup=False)
        advice = Static(self.question.advice, classes="advice", markup=False)
        if self.question.form == "number":
            with Horizontal(classes="line"):
                yield ask
                yield control
                yield Static("", classes="note", markup=False)
            yield advice
        else:
            yield ask
            yield advice
        if not self._draft.can_be_typed(self.question):
            control.disabled = True
            yield Static(
                "It holds characters that cannot be typed here: change it in an answers file.",
                classes="advice",
            )
        if self.question.form != "number":
            yield control
        yield Static("", classes="fault", markup=False)

    def _control(self) -> Widget:
        question, draft = self.question, self._draft
        value: Any = draft.get(question.field)
        if question.form in LINES:
            text = printable(draft.text(question))
            return AnswerLines(text, tab_behavior="focus", compact=True)
        if question.form == "choice":
            return Choices(question.choices, [value], several=False)
        if question.form == "several":
            return Choices(question.choices, value or (), several=True)
        return AnswerInput(printable(draft.text(question)), question.form == "number")

    @property
    def control(self) -> Widget:
        """What takes the answer."""
        return self.query(CONTROLS).first()

    def show_fault(self, message: str) -> None:
        """Show what is wrong under the control, or nothing."""
        fault = self.query_one(".fault", Static)
        fault.update(message)
        fault.display = bool(message)

    def show_note(self, text: str) -> None:
        """A few words beside a number."""
        self.query_one(".note", Static).update(text)

    def show_answer(self) -> None:
        """The control as the draft has it now: another answer changed this one."""
        control = self.control
        text = printable(self._draft.text(self.question))
        if isinstance(control, Choices):
            value = self._draft.get(self.question.field)
            control.choose(value or () if self.question.form == "several" else [value])
        elif isinstance(control, TextArea):
            # Blank lines that are being typed say nothing, and stay.
            read = Draft({})
            read.answer(self.question, control.text)
            same = read.get(self.question.field) == self._draft.get(self.question.field)
            ahead = control.text != self._taken
            if not control.disabled and not same and not ahead and control.text != text:
                control.text = self._taken = text
                control.move_cursor(control.document.end)
        elif isinstance(control, Input) and control.value == self._taken != text:
            control.value = self._taken = text
            control.cursor_position = len(text)  # else what is typed next goes into its middle

    def _take(self, text: str) -> None:
        self._taken = text
        # Controls report what they begin with, too.
        if text != printable(self._draft.text(self.question)):
            self._draft.answer(self.question, text)
            self._answered()

    def _answered(self) -> None:
        self.post_message(self.Changed(self.question))

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        self._take(event.input.value)

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
