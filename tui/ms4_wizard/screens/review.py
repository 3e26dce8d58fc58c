"""The last screen: all answers, where the project goes, and the plan; it writes the project."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import Screen
from textual.widgets import Button, Footer, Input, Label, OptionList, Static
from textual.widgets.option_list import Option

from ms4.config import expand_home
from ms4.errors import Ms4Error, printable
from ms4_wizard.flow import Flow, Go
from ms4_wizard.project import EditedError, read_note
from ms4_wizard.questions import STEPS, Choice
from ms4_wizard.widgets.choices import Choices
from ms4_wizard.widgets.plan import PlanPanel
from ms4_wizard.widgets.title import Title

REPLACE = Choice("Replace", "what was edited is kept as NAME.bak")


class ReviewScreen(Screen[None]):
    """Shows all answers; choosing one goes to its screen."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "write", "Write the project"),
        Binding("escape", "back", "Back"),
    ]

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow
        self._overwrite = False

    def compose(self) -> ComposeResult:
        yield Title("Review", len(STEPS))
        with Horizontal(id="body"):
            with VerticalScroll(id="questions", can_focus=False):
                with Vertical(id="target"):
                    yield Label("Project directory", classes="ask")
                    yield Input(self.flow.directory, id="directory", compact=True)
                yield Label("Answers (Enter changes one)", classes="ask")
                yield OptionList(*self._options(), id="answers", markup=False, compact=True)
            with VerticalScroll(id="side", can_focus=False):
                yield PlanPanel(id="plan")
        with VerticalScroll(id="verdict", can_focus=False):
            yield Static("", id="fault", classes="fault", markup=False)
            yield Choices((REPLACE,), (), several=True, id="overwrite")
        with Horizontal(id="buttons"):
            yield Button("Back", id="back", compact=True)
            yield Button("Write the project", id="write", variant="primary", compact=True)
        yield Footer()

    def _options(self) -> list[Option]:
        options = []
        for number, step in enumerate(STEPS):
            for question in step.questions:
                if self.flow.draft.asks(question):
                    # A line each, whatever is in it.
                    value = printable(self.flow.draft.text(question)).replace("\n", ", ")
                    line = Text.assemble(
                        (question.field, "bold"), "  ", value or ("(not given)", "dim")
                    )
                    line.truncate(200, overflow="ellipsis")
                    options.append(Option(line, id=f"{number}-{question.field}"))
        return options

    def on_mount(self) -> None:
        """The plan, what is wrong, and the button in reach."""
        self.query_one("#overwrite").display = False
        self.query_one(PlanPanel).show(self.flow.cost())
        self._show_fault(self.flow.all_faults())
        self.query_one("#write").focus()

    def _show_fault(self, message: str) -> None:
        fault = self.query_one("#fault", Static)
        fault.update(message)
        fault.display = bool(message)

    @on(Input.Changed, "#directory")
    def _directory_changed(self, event: Input.Changed) -> None:
        self.flow.directory = event.value

    @on(OptionList.OptionSelected)
    def _chosen(self, event: OptionList.OptionSelected) -> None:
        self.post_message(Go(int(str(event.option_id).split("-")[0])))

    @on(Button.Pressed, "#back")
    def action_back(self) -> None:
        """Go back to the last questions."""
        self.post_message(Go(len(STEPS) - 1))

    @on(Choices.Chosen)
    def _overwrite_chosen(self, event: Choices.Chosen) -> None:
        self._overwrite = bool(event.values)

    def _check_other_project(self, directory: Path) -> None:
        if read_note(directory) is not None and directory.resolve() != self.flow.opened:
            raise EditedError(
                f"{directory}: holds another project, which would be replaced. Open it with "
                "`ms4-wizard DIR`, name another directory, or choose Replace below."
            )

    @on(Button.Pressed, "#write")
    def action_write(self) -> None:
        """Write the project and leave, or say what is wrong."""
        answers, _ = self.flow.draft.check()
        if answers is None:
            self._show_fault(self.flow.all_faults())
            return
        if not self.flow.directory.strip():
            self._show_fault("Give the project a directory.")
            return
        directory = expand_home(self.flow.directory)
        try:
            if not self._overwrite:
                self._check_other_project(directory)
            told = self.flow.write(answers, directory, overwrite=self._overwrite)
        except Ms4Error as error:
            self._show_fault(printable(str(error)))
            self.query_one("#overwrite").display = isinstance(error, EditedError)
            return
        self.app.exit(told)
