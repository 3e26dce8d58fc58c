"""What writing the project changes, file by file, and whether to do it."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Footer, Static

from ms4.errors import printable
from ms4_wizard.project import Change

MOST_LINES = 5_000
"""Lines of a diff that are shown."""


def told(change: Change) -> Text:
    """A file in the list: a mark, its name, and what happens to it."""
    if change.what == "written":
        new = not change.before
        what = "new" if new else "changed"
        return Text.assemble(("+ " if new else "~ ", "green"), change.name, (f"  {what}", "dim"))
    marks = {
        "kept": ("= ", "dim", "kept as you edited it"),
        "merged": ("& ", "cyan", "what you edited stays, what is new goes in"),
        "replaced": ("! ", "bold red", "replaced; what you edited is kept as NAME.bak"),
    }
    mark, style, words = marks[change.what]
    return Text.assemble((mark, style), change.name, (f"  {words}", "dim"))


def coloured(diff: str) -> Text:
    """A unified diff; its marks say the same without colours."""
    styles = {"+": "green", "-": "red", "@": "cyan"}
    lines = printable(diff.replace("\t", "    ")).split("\n")
    text = Text()
    for line in lines[:MOST_LINES]:
        head = line.startswith(("+++", "---"))
        text.append(line + "\n", "bold" if head else styles.get(line[:1], ""))
    if len(lines) > MOST_LINES:
        text.append(f"… and {len(lines) - MOST_LINES} lines more", "dim")
    return text


class DiffScreen(ModalScreen[bool]):
    """Lists the files, then their differences; returns whether to write them."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "write", "Write"),
        Binding("escape", "close", "Back"),
    ]

    def __init__(self, changes: list[Change], where: str, ask: bool) -> None:
        """
        Args:
            changes: what `writing.preview` says.
            where: the project's directory.
            ask: offer to write, and not only to look.
        """
        super().__init__()
        self._changes = changes
        self._where = where
        self._ask = ask

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="page") as page:
            page.border_title = f"Files of {printable(self._where)}"
            if not self._changes:
                yield Static("Nothing changes.")
            for change in self._changes:
                yield Static(told(change))
            for change in self._changes:
                # Of a project that is new, the list says all but the settings.
                if change.before or change.name == "config/config.yaml":
                    yield Static(coloured(change.diff()), classes="diff")
        if self._ask:
            with Horizontal(id="ask"):
                lost = any(change.what == "replaced" for change in self._changes)
                yield Button("Back", id="close", compact=True)
                yield Button(
                    "Replace and write" if lost else "Write",
                    id="write",
                    variant="error" if lost else "primary",
                    compact=True,
                )
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Arrow keys scroll at once."""
        self.query_one("#page").focus()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Writing is offered where it was asked for."""
        return self._ask if action == "write" else True

    @on(Button.Pressed, "#write")
    def action_write(self) -> None:
        """Write them."""
        self.dismiss(True)

    @on(Button.Pressed, "#close")
    def action_close(self) -> None:
        """Write nothing."""
        self.dismiss(False)
