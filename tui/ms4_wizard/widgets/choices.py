"""A list to choose one or several from. The marks are characters, not only colours."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from ms4_wizard.questions import Choice


class Choices(OptionList):
    """Up and down move, Enter or space chooses; a click does both."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("space", "select", "Choose", show=False)]

    class Chosen(Message):
        """What is chosen now, in the order of the list."""

        def __init__(self, values: list[str]) -> None:
            super().__init__()
            self.values = values

    def __init__(
        self,
        choices: tuple[Choice, ...],
        chosen: Collection[str],
        several: bool,
        id: str | None = None,
    ) -> None:
        self._choices = choices
        self._chosen = set(chosen)
        self._several = several
        self._notes: dict[str, str] = {}
        super().__init__(*(Option(self._prompt(choice)) for choice in choices), id=id, compact=True)

    def _prompt(self, choice: Choice) -> Text:
        marks = "☐☑" if self._several else "○●"
        mark = marks[choice.value in self._chosen]
        note = self._notes.get(choice.value, "")
        return Text.assemble(
            f"{mark} ",
            (choice.value, "bold"),
            (f"  {note}" if note else ""),
            (f"\n  {choice.meaning}", "dim"),
        )

    def on_mount(self) -> None:
        """Begin where the answer is."""
        values = [choice.value for choice in self._choices]
        self.highlighted = next((i for i, v in enumerate(values) if v in self._chosen), 0)

    def choose(self, values: Collection[str]) -> None:
        """Show other values as chosen."""
        if set(values) != self._chosen:
            self._chosen = set(values)
            self._redraw()

    def annotate(self, notes: Mapping[str, str]) -> None:
        """Words after the meanings of some of the choices, by value."""
        if notes != self._notes:
            self._notes = dict(notes)
            self._redraw()

    def _redraw(self) -> None:
        for index, choice in enumerate(self._choices):
            self.replace_option_prompt_at_index(index, self._prompt(choice))

    @on(OptionList.OptionSelected)
    def _select(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        value = self._choices[event.option_index].value
        if self._several:
            self._chosen ^= {value}
        else:
            self._chosen = {value}
        self._redraw()
        self.post_message(self.Chosen([c.value for c in self._choices if c.value in self._chosen]))
