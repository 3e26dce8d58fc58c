"""Training: numbers that follow from the data and the plan until a person gives their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual import events, on
from textual.binding import Binding, BindingType
from textual.widget import Widget
from textual.widgets import Static

from ms4_wizard.costs import Cost
from ms4_wizard.draft import Draft
from ms4_wizard.screens.step import StepScreen
from ms4_wizard.suggest import Suggestion
from ms4_wizard.widgets.answer import Answer


def written(value: object) -> str:
    """A suggested value as a person would type it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


class TrainingScreen(StepScreen):
    """Each number with what it would be by default, and the reason for it on request."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+r", "computed", "Take computed")]

    def on_mount(self) -> None:
        """Numbers that nobody gave are computed."""
        self.flow.compute()

    def compose_extra(self) -> Iterable[Widget]:
        """The advice of the number that has the focus: there is no room for all of them, and one
        that opened below its number would move what a mouse points at."""
        yield Static("", id="advice", markup=False)

    @on(events.DescendantFocus)
    def _advise(self, event: events.DescendantFocus) -> None:
        for answer in self.query(Answer):
            if answer in event.widget.ancestors:  # a choice has its advice above it
                number = answer.question.form == "number"
                self.query_one("#advice", Static).update(answer.question.advice if number else "")

    def answers_changed(self) -> None:
        """What follows from a changed answer changes with it."""
        self.flow.compute()
        super().answers_changed()

    def show_extra(self, found: Cost | str) -> None:
        """Say which numbers are computed, and what the others would be."""
        suggestions = self.flow.suggestions()  # none while an answer is wrong
        for answer in self.query(Answer):
            field = answer.question.field
            suggestion = suggestions.get(field)
            if answer.question.form != "number":
                continue
            if not self.flow.draft.given(field):
                answer.show_note("computed")
            elif suggestion is None or self._same(field, suggestion):
                answer.show_note("")
            else:
                wide = self.app.size.width >= 110
                answer.show_note(f"{'computed:' if wide else '↺'} {written(suggestion.value)}")

    def _same(self, field: str, suggestion: Suggestion) -> bool:
        try:
            return float(self.flow.draft.get(field)) == float(suggestion.value)
        except (TypeError, ValueError):
            return False

    def explain(self, field: str) -> list[tuple[str, str]]:
        """The reason for the computed value."""
        suggestion = self.flow.suggestions().get(field)
        if suggestion is None:
            return []
        return [
            ("reason", f"Computed: {written(suggestion.value)}. {suggestion.reason}"),
            ("reason", "Ctrl+R takes the computed value."),
        ]

    def action_computed(self) -> None:
        """Take the computed value for the number that has the focus."""
        for answer in self.query(Answer):
            if answer.has_focus_within:
                field = answer.question.field
                # In place of what is wrong, too: what follows from the others comes of its default.
                self.flow.draft.compute(field, Draft({}).get(field))
                self.answers_changed()
