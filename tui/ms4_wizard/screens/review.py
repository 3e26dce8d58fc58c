"""The last screen before the project: all answers, editable in place, the plan, and the files."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.widgets import Button, Footer, Input, OptionList, Static
from textual.widgets.option_list import Option

from ms4.config import expand_home
from ms4.errors import Ms4Error, printable
from ms4_wizard import writing
from ms4_wizard.answers import Answers
from ms4_wizard.go import Go
from ms4_wizard.project import Change, read_note
from ms4_wizard.screens.diff import DiffScreen
from ms4_wizard.screens.done import DoneScreen
from ms4_wizard.screens.edit import EditScreen
from ms4_wizard.screens.help import HelpScreen
from ms4_wizard.screens.step import PlanScreen
from ms4_wizard.steps import QUESTIONS, STEPS
from ms4_wizard.widgets.plan import PlanPanel
from ms4_wizard.widgets.title import Title

HELP = [
    ("title", "Review"),
    ("text", "All answers by screen. Enter changes the one that is marked, in place."),
    ("text", "Ctrl+D shows which files will be written, and how those that exist change."),
    (
        "text",
        "Ctrl+S writes the project. If it exists, the differences are shown first; files that you "
        "edited keep what you wrote, unless the new answers change the same lines.",
    ),
    ("text", "Nothing is fetched or trained by writing: the next screen says how to start."),
]


class ReviewScreen(PlanScreen):
    """Shows all answers; choosing one changes it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "write", "Write", priority=True),
        Binding("ctrl+d", "files", "Files", priority=True),
        Binding("escape", "back", "Back"),
        Binding("f1", "help", "Help", key_display="?/F1"),
        Binding("question_mark", "help", "Help", show=False),
    ]

    def compose(self) -> ComposeResult:
        yield Title("Review", len(STEPS))
        with Horizontal(id="body"):
            with VerticalScroll(id="questions", can_focus=False):
                with Horizontal(id="target"):
                    yield Static("Project", classes="ask")
                    yield Input(
                        printable(self.flow.directory),
                        id="directory",
                        compact=True,
                        select_on_focus=False,
                    )
                yield OptionList(id="answers", markup=False, compact=True)
            with VerticalScroll(id="side", can_focus=False):
                yield PlanPanel(id="plan")
        with VerticalScroll(id="verdict", can_focus=False):
            yield Static("", id="fault", classes="fault", markup=False)
        with Horizontal(id="buttons"):
            yield Button("Back", id="back", compact=True)
            yield Button("Files", id="files", compact=True)
            yield Button("Write the project", id="write", variant="primary", compact=True)
        yield Footer()

    def on_mount(self) -> None:
        """What nobody answered is computed, and the button is in reach."""
        self.flow.compute()
        self._list_answers()
        self._show_fault(self.flow.all_faults())
        self.query_one("#write").focus()

    def on_screen_resume(self) -> None:
        """An answer may have been changed."""
        self.answers_changed()
        self.flow.look(self.app)

    def look_changed(self) -> None:
        """What is computed follows from the data."""
        looker = self.flow.looker
        if looker is not None and looker.look is not None and looker.look.state == "done":
            self.answers_changed()

    def answers_changed(self) -> None:
        """The draft has other answers: keep and show them."""
        self.flow.compute()
        super().answers_changed()
        self._list_answers()
        self._show_fault(self.flow.all_faults())

    def _list_answers(self) -> None:
        options = self.query_one("#answers", OptionList)
        marked = options.highlighted
        options.clear_options()
        draft = self.flow.draft
        for step in STEPS:
            asked = [question for question in step.questions if draft.asks(question)]
            if not asked:
                continue
            options.add_option(Option(Text(step.title, "italic"), disabled=True))
            for question in asked:
                # A line each, whatever is in it.
                value = printable(draft.text(question)).replace("\n", ", ")
                computed = "  (computed)" if question.field in draft.computed else ""
                line = Text.assemble(
                    f"  {question.name}  ",
                    (value, "bold") if value else ("(not given)", "dim"),
                    (computed, "dim"),
                )
                line.truncate(200, overflow="ellipsis")
                options.add_option(Option(line, id=question.field.replace(".", "-")))
        if marked is not None:
            options.highlighted = min(marked, options.option_count - 1)

    def _show_fault(self, message: str) -> None:
        fault = self.query_one("#fault", Static)
        fault.update(message)
        fault.display = bool(message)

    @on(Input.Changed, "#directory")
    def _directory_changed(self, event: Input.Changed) -> None:
        if event.value != printable(self.flow.directory):
            self.flow.directory = event.value
            self.flow.save()

    @on(Input.Submitted)
    def _submitted(self) -> None:
        self.focus_next()

    @on(OptionList.OptionSelected)
    def _chosen(self, event: OptionList.OptionSelected) -> None:
        field = next(f for f in QUESTIONS if f.replace(".", "-") == event.option_id)
        self.app.push_screen(EditScreen(self.flow, QUESTIONS[field]))

    @on(Button.Pressed, "#back")
    def action_back(self) -> None:
        """Go back to the last questions."""
        self.post_message(Go(len(STEPS) - 1))

    def action_help(self) -> None:
        """What this screen is for."""
        self.app.push_screen(HelpScreen(HELP))

    def _checked(self) -> tuple[Answers, list[Change]] | None:
        """The answers, and what writing them changes; shows what is wrong."""
        answers, _ = self.flow.draft.check()
        if answers is None:
            self._show_fault(self.flow.all_faults())
            return None
        if not self.flow.directory.strip():
            self._show_fault("Give the project a directory.")
            return None
        if refused := self.flow.refused_images(answers):
            self._show_fault(refused)
            return None
        directory = expand_home(self.flow.directory)
        try:
            writing.check(answers, directory)
            changes = writing.preview(answers, directory)
        except Ms4Error as error:
            self._show_fault(printable(str(error)))
            return None
        self._show_fault("")
        return answers, changes

    @on(Button.Pressed, "#files")
    def action_files(self) -> None:
        """Show what would be written."""
        if (checked := self._checked()) is not None:
            self.app.push_screen(DiffScreen(checked[1], self.flow.directory, ask=False))

    @on(Button.Pressed, "#write")
    def action_write(self) -> None:
        """Write the project, after a look at what changes in one that exists."""
        if (checked := self._checked()) is None:
            return
        answers, changes = checked
        directory = expand_home(self.flow.directory)
        if read_note(directory) is None:
            self._write(answers, True)
            return
        other = directory.resolve() != self.flow.opened
        name = f"another project: {self.flow.directory}" if other else self.flow.directory
        self.app.push_screen(
            DiffScreen(changes, name, ask=True), lambda wanted: self._write(answers, wanted)
        )

    def _write(self, answers: Answers, wanted: bool | None) -> None:
        if not wanted:
            return
        directory = expand_home(self.flow.directory)
        try:
            told = writing.write_from_answers(answers, directory, overwrite=True)
        except Ms4Error as error:
            self._show_fault(printable(str(error)))
            return
        self.flow.written(directory)
        self.app.push_screen(DoneScreen(answers, directory, told))
