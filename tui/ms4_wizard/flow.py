"""What all screens share: the draft, its faults and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from textual.message import Message

from ms4.errors import Ms4Error, printable
from ms4_wizard import costs, emit
from ms4_wizard.questions import Answers, Draft


class Writer(Protocol):
    """Writes the project of the answers and returns what to say then; raises Ms4Error."""

    def __call__(
        self, answers: Answers, directory: Path, *, overwrite: bool = False
    ) -> list[str]: ...


class Go(Message):
    """A screen asks for another one, by the step's number; the one after the last is the review."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Flow:
    """The state of a session with the wizard."""

    def __init__(
        self,
        draft: Draft,
        directory: Path,
        write: Writer,
        opened: bool = False,
    ) -> None:
        """
        Args:
            draft: the answers so far.
            directory: where the project is to be written.
            write: writes the project.
            opened: the directory holds a project, whose answers these are.
        """
        self.draft = draft
        self.directory = str(directory)
        self.write = write
        self.opened = directory.resolve() if opened else None
        """The project whose answers these are, or None."""

    def faults(self, files: bool = False) -> dict[str, str]:
        """What is wrong, by field; with `files`, data files that are not there too."""
        answers, faults = self.draft.check()
        if files and answers is not None:
            faults = emit.missing_data(answers, Path.cwd())
        return {field: printable(message) for field, message in faults.items()}

    def all_faults(self) -> str:
        """What is wrong with all answers, a line each."""
        faults = self.faults(files=True)
        return "\n".join(f"{field}: {x}" if field else x for field, x in faults.items())

    def cost(self) -> costs.Cost | str:
        """The plan, or why there is none. It is made before the data are named, too."""
        if not costs.machine_is_known():
            return "Looking at the machine…"
        draft = Draft(self.draft.values)
        if not draft.get("data.train"):
            draft.set("data.train", ["-"])
        answers, faults = draft.check()
        if answers is None:
            field, message = next(iter(faults.items()))
            return printable(f"No plan yet. {field + ': ' if field else ''}{message}")
        try:
            return costs.cost(answers)
        except Ms4Error as error:
            return printable(f"No plan: {error}")
