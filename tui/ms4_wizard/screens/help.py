"""The longer page of a question, over the screen that asks it."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Footer, Static

STYLES = {"title": "bold", "text": "", "choice": "bold", "key": "dim", "reason": "italic"}


class HelpScreen(ModalScreen[None]):
    """Pages of text; any of Escape, `?`, F1 and Enter closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,enter,question_mark,f1", "close", "Close", key_display="esc"),
        Binding("up,down", "scroll", "Scroll", show=False),
    ]

    def __init__(self, paragraphs: list[tuple[str, str]]) -> None:
        """
        Args:
            paragraphs: style (see `STYLES`) and text of each.
        """
        super().__init__()
        self._paragraphs = paragraphs

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="page") as page:
            page.border_title = "Help"
            for style, text in self._paragraphs:
                yield Static(Text(text, STYLES[style]), classes=style)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Arrow keys scroll at once."""
        self.query_one("#page").focus()

    def action_close(self) -> None:
        """Back to the question."""
        self.dismiss()
