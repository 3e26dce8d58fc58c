"""Picking a file with the keyboard: a path with completion, and what it can go on as."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Footer, Input, OptionList, Static
from textual.widgets.option_list import Option

from ms4.config import expand_home
from ms4_wizard.paths import candidates
from ms4_wizard.widgets.path_input import PathInput


class PickerScreen(ModalScreen[str | None]):
    """Returns the path that was picked, as it was typed or chosen; None if none was."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "Back"),
        Binding("down", "list", "To the list"),
    ]

    def __init__(self, begun: str = "") -> None:
        """
        Args:
            begun: what was typed of the path so far.
        """
        super().__init__()
        self._begun = begun

    def compose(self) -> ComposeResult:
        with Vertical(id="page") as page:
            page.border_title = "Pick a file"
            yield Static("Type a path: Tab completes, Enter picks. ↓ goes to the list.")
            yield PathInput(id="path")
            yield OptionList(id="found", markup=False, compact=True)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """What is here."""
        self._list(self._begun)
        line = self.query_one("#path", PathInput)
        line.value = self._begun
        line.cursor_position = len(self._begun)
        line.focus()

    def _list(self, typed: str) -> None:
        options = self.query_one("#found", OptionList)
        options.clear_options()
        options.add_options([Option(Text(path)) for path in candidates(typed, Path.cwd())])

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        self._list(event.value)

    def action_list(self) -> None:
        """Into the list."""
        options = self.query_one("#found", OptionList)
        if options.option_count:
            options.focus()
            options.highlighted = options.highlighted or 0

    @on(OptionList.OptionSelected)
    def _chosen(self, event: OptionList.OptionSelected) -> None:
        self._take(str(event.option.prompt))

    @on(Input.Submitted)
    def _given(self, event: Input.Submitted) -> None:
        self._take(event.value)

    def _take(self, path: str) -> None:
        if (Path.cwd() / expand_home(path or ".")).is_dir():
            line = self.query_one("#path", PathInput)
            line.value = path if path.endswith("/") or not path else f"{path}/"
            line.cursor_position = len(line.value)
            line.focus()
        elif path.strip():
            self.dismiss(path)

    def action_close(self) -> None:
        """Pick nothing."""
        self.dismiss(None)
