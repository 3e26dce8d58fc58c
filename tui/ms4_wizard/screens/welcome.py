"""The first screen: what to begin with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import Screen
from textual.widgets import Footer, Input, OptionList, Static
from textual.widgets.option_list import Option

from ms4.errors import Ms4Error, printable
from ms4.home import expand_home
from ms4_wizard import demo
from ms4_wizard.drafts import Kept
from ms4_wizard.go import Go
from ms4_wizard.steps import STEPS
from ms4_wizard.widgets.path_input import PathInput

if TYPE_CHECKING:  # this screen is the first frame: it does not wait for the configuration
    from ms4_wizard.app import WizardApp
    from ms4_wizard.draft import Draft

INTRODUCTION = (
    "Fine-tune Mistral Small 4 (119 B). Some ten minutes of questions, each with its price in "
    "memory and time; then a project is written that you can read, change and run. Nothing is "
    "fetched or trained before you start it."
)
PATHS = {"open": "Directory of the project", "file": "Answers file (YAML or JSON)"}
"""What the choices that need a path call it."""

PAGE = (
    ("title", "What to begin with"),
    (
        "text",
        "New project: the questions, each with an answer that most people leave. Open a project: "
        "one that was written before; only what you change is written again. From an answers "
        "file: what `ms4-wizard --answers FILE` takes. The demo shows the whole pipeline on a CPU.",
    ),
    ("title", "Keys"),
    ("text", "↑ ↓, then Enter or Space: choose. Tab and Shift+Tab: the next and the last control."),
    ("text", "Ctrl+N: the next screen. Esc: the one before. Nothing that was typed is lost."),
    ("text", "PageUp, PageDown: more of what stands at the right, where it is cut."),
    ("text", "? or F1: the longer page of a question. Ctrl+P: any screen, by its name."),
    ("text", "Ctrl+T: light or dark. Ctrl+Q: leave; the answers stay as a draft."),
)
"""What `?` shows here."""


class WelcomeScreen(Screen[None]):
    """A draft, a new project, one that exists, an answers file, or the demo."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "list", "Back to the list", show=False),
        Binding("ctrl+n", "next", "Next"),
        Binding("f1", "help", "Help", key_display="?/F1"),
        Binding("question_mark", "help", "Help", show=False),
        Binding("ctrl+q", "app.quit", "Quit"),
    ]

    app: WizardApp

    def __init__(self, kept: Kept | None = None, opened: str | None = None) -> None:
        """
        Args:
            kept: a draft that was found.
            opened: the directory of the project that is open; None: none is.
        """
        super().__init__()
        self._kept = kept
        self._opened = opened

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="welcome", can_focus=False):
            yield Static("ms4", classes="ask", id="name")
            yield Static(INTRODUCTION, id="introduction")
            yield OptionList(*self._options(), id="begin", compact=True)
            yield Static("", id="path-name", classes="advice")
            yield PathInput(id="path")
            yield Static("", id="fault", classes="fault", markup=False)
            yield Static(
                "Keys: arrows and Enter choose, Tab goes on, Ctrl+N next, Esc back, ? help, "
                "Ctrl+P all commands. Everything works with a mouse, too.",
                classes="advice",
            )
        yield Footer()

    def _options(self) -> Iterator[Option]:
        if self._kept is not None:
            yield _option(
                "draft",
                "Go on with the draft",
                f"of {self._kept.when:%Y-%m-%d %H:%M}, {self._kept.count} answers, "
                f"for {printable(self._kept.directory)}",
            )
        if self._opened is not None:
            name = printable(self._opened)
            yield _option("as-is", "Open the project as it is", f"{name}, without the draft")
        else:
            yield _option("new", "New project", f"{len(STEPS)} short screens, then a review")
        yield _option("open", "Open a project", "its answers are shown, and can be changed")
        yield _option("file", "From an answers file", "then a review")
        yield _option("demo", "Try the demo", "a tiny model learns a small task in 5 minutes")

    def on_mount(self) -> None:
        """The list has the focus; a path is asked for where one is needed."""
        self.query_one("#path").display = False
        self.query_one("#path-name").display = False
        self.query_one("#begin", OptionList).highlighted = 0
        self.query_one("#begin").focus()

    @on(OptionList.OptionHighlighted)
    def _marked(self, event: OptionList.OptionHighlighted) -> None:
        needed = PATHS.get(str(event.option_id))
        self.query_one("#path").display = needed is not None
        label = self.query_one("#path-name", Static)
        label.display = needed is not None
        label.update(f"{needed}; Tab completes" if needed else "")
        self._show_fault("")

    def _show_fault(self, text: str) -> None:
        fault = self.query_one("#fault", Static)
        fault.update(printable(text))
        fault.display = bool(text)

    def action_list(self) -> None:
        """The list again."""
        self.query_one("#begin").focus()

    def action_next(self) -> None:
        """Go on with what is marked, or with the path that was typed."""
        begin = self.query_one("#begin", OptionList)
        typed = self.query_one("#path", PathInput)
        if typed.display and typed.value:
            typed.post_message(Input.Submitted(typed, typed.value))
        else:
            begin.action_select()

    def action_help(self) -> None:
        """What can be begun with, and the keys of all screens."""
        from ms4_wizard.screens.help import HelpScreen

        self.app.push_screen(HelpScreen(list(PAGE)))

    @on(OptionList.OptionSelected)
    def _chosen(self, event: OptionList.OptionSelected) -> None:
        wanted = str(event.option_id)
        if wanted in PATHS:
            self.query_one("#path").focus()
            return
        if wanted == "draft" and self._kept is not None:
            flow = self.app.flow
            flow.draft, flow.directory = self._kept.draft, self._kept.directory
            self.post_message(Go(len(STEPS) if flow.opened else 0))
        elif wanted == "as-is":
            self.post_message(Go(len(STEPS)))
        elif wanted == "new":
            self.post_message(Go(0))
        else:
            self._demo()

    def _demo(self) -> None:
        from ms4_wizard.draft import Draft

        try:
            demo.write_data()
        except Ms4Error as error:
            self._show_fault(str(error))
            return
        self._begin(Draft(demo.answers()), demo.PROJECT)

    def _begin(self, draft: Draft, directory: Path, opened: bool = False) -> None:
        self.app.flow.begin(draft, directory, opened)
        self.post_message(Go(len(STEPS)))

    @on(Input.Submitted, "#path")
    def _path_given(self, event: Input.Submitted) -> None:
        options = self.query_one("#begin", OptionList)
        chosen = options.highlighted_option
        if not event.value.strip() or chosen is None:
            return
        from ms4_wizard import project
        from ms4_wizard.answers_file import read_answers
        from ms4_wizard.draft import Draft

        path = expand_home(event.value)
        try:
            if chosen.id == "open":
                self._begin(Draft.of(project.read_project(path)), path, opened=True)
            else:
                self._begin(Draft.of(read_answers(str(path), ())), Path(self.app.flow.directory))
        except Ms4Error as error:
            self._show_fault(str(error))


def _option(key: str, title: str, meaning: str) -> Option:
    return Option(Text.assemble((title, "bold"), (f"\n  {meaning}", "dim")), id=key)
