"""What all screens share: the draft, its faults and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from textual.app import App

from ms4.errors import Ms4Error, printable
from ms4_wizard import costs, drafts, emit, suggest
from ms4_wizard.answers import Answers
from ms4_wizard.draft import Draft
from ms4_wizard.looking import Looker
from ms4_wizard.speed import Size, Speed, speed
from ms4_wizard.steps import QUESTIONS


class Flow:
    """The state of a session with the wizard."""

    def __init__(
        self,
        draft: Draft,
        directory: Path,
        opened: bool = False,
        store: drafts.Store | None = None,
        looker: Looker | None = None,
    ) -> None:
        """
        Args:
            draft: the answers so far.
            directory: where the project is to be written.
            opened: the directory holds a project, whose answers these are.
            store: where drafts are kept; None: nowhere.
            looker: what looks at the data; None: it is not looked at.
        """
        self.draft = draft
        self.directory = str(directory)
        self.opened = directory.resolve() if opened else None
        """The project whose answers these are, or None."""
        self.store = store
        self.looker = looker
        self._written: Any = None
        """What was said when the project was written, if it was."""
        self.data: Size | None = None
        """How much training data there is, once it was looked at."""

    def faults(self, files: bool = False) -> dict[str, str]:
        """What is wrong, by field; with `files`, data files that are not there too."""
        answers, faults = self.draft.check()
        if files and answers is not None:
            faults = emit.missing_data(answers, Path.cwd())
        return {field: printable(message) for field, message in faults.items()}

    def all_faults(self) -> str:
        """What is wrong with all answers, a line each."""
        faults = self.faults(files=True)
        names = {field: QUESTIONS[field].name if field in QUESTIONS else field for field in faults}
        return "\n".join(f"{names[field]}: {x}" if field else x for field, x in faults.items())

    def answers(self) -> Answers | str:
        """The answers as far as a plan needs them, or what is wrong with them."""
        draft = self.draft
        if not draft.get("data.train"):
            draft = draft.copy()
            draft.set("data.train", ["-"])
        answers, faults = draft.check()
        if answers is not None:
            return answers
        field, message = next(iter(faults.items()))
        asked = QUESTIONS[field].name if field in QUESTIONS else field
        return printable(f"No plan yet. {asked + ': ' if asked else ''}{message}")

    def cost(self) -> costs.Cost | str:
        """The plan, or why there is none. It is made before the data are named, too."""
        if not costs.machine_is_known():
            return "Looking at the machine…"
        answers = self.answers()
        if isinstance(answers, str):
            return answers
        try:
            return costs.cost(answers)
        except Ms4Error as error:
            return printable(f"No plan: {error}")

    def speed(self, found: costs.Cost) -> Speed | None:
        """What the run takes in time and energy."""
        answers = self.answers()
        return None if isinstance(answers, str) else speed(answers, found, self.data, self.opened)

    def remedy(self) -> Callable[[], costs.Remedy | str] | None:
        """What looks for what makes a run fit that does not, and answers a sentence if nothing
        does: it takes up to a second, and may run in a thread. None: it fits."""
        found, answers = self.cost(), self.answers()
        if isinstance(found, str) or isinstance(answers, str) or found.fits is not False:
            return None
        longest = None if self.data is None else self.data.longest
        none = "No change of the answers makes it fit."
        return lambda: costs.remedy(answers, found, longest) or none

    def suggestions(self) -> dict[str, suggest.Suggestion]:
        """What the training questions' answers would be by the data and the plan."""
        found, answers = self.cost(), self.answers()
        if isinstance(answers, str):
            return {}
        return suggest.suggestions(answers, self.data, None if isinstance(found, str) else found)

    def compute(self) -> None:
        """Give the questions that nobody answered what follows from the other answers."""
        for _ in range(2):  # the size of a step follows from the length of a sequence
            for field, suggestion in self.suggestions().items():
                if not self.draft.given(field):
                    self.draft.compute(field, suggestion.value)

    def begin(self, draft: Draft, directory: Path, opened: bool) -> None:
        """Begin with other answers, for another directory."""
        self.draft = draft
        self.directory = str(directory)
        self.opened = directory.resolve() if opened else None
        self.data = self._written = None
        if self.looker is not None:
            self.looker.cancel()
            self.looker.look = None
        if self.store is not None:
            self.store = self.store.of(directory)

    def written(self, directory: Path) -> None:
        """The project was written: no draft is left, and it is the one that is open."""
        self.opened = directory.resolve()
        self._written = self._said()
        if self.store is not None:
            self.store.forget()

    def look(self, app: App[Any], again: bool = False) -> None:
        """Look at the data beside the screens, if it is named and there; the screen that is shown
        is told what is found."""
        answers = self.answers()
        if self.looker is None or isinstance(answers, str) or not self.draft.get("data.train"):
            return
        looker = self.looker

        def told() -> None:
            if looker.look is not None and looker.look.state != "reading":
                self.data = looker.look.amount
            for screen in app.screen_stack:
                if hasattr(screen, "look_changed") and screen.is_mounted:
                    screen.look_changed()

        # What is known of other data says nothing of data that is not there.
        if missing := emit.missing_data(answers, Path.cwd()).get("data.train"):
            looker.refuse(missing)
            told()
        else:
            looker.start(answers, told, again)

    def refused_images(self, answers: Answers) -> str:
        """What to do if the run would stop at images in the data; nothing if it would not."""
        look = self.looker.look if self.looker is not None else None
        images = look.found.get("images", 0) if look is not None else 0
        if not images or answers.data.modality != "text" or answers.data.faulty == "drop":
            return ""
        return (
            f"Content: `text` alone, and the data holds {images:,} images, at which the run would "
            "stop. Answer `text and images`, or have faulty records left out."
        )

    def unread(self) -> str:
        """Why nothing is known of the data, where nothing was looked at yet."""
        answers = self.answers()
        if not self.draft.get("data.train"):
            return "Name the data: it is looked at here, as the model will see it."
        if isinstance(answers, str):
            wrong = answers.removeprefix("No plan yet. ")
            return f"The data is looked at when the answers are right. {wrong}"
        return "The data is looked at when the keys rest."

    def save(self) -> None:
        """Keep the draft: a terminal that is closed loses nothing."""
        # What is computed later, of data that was still being read, is no answer that was lost.
        if self.store is None:
            return
        if self._said() == self._written:
            self.store.forget()
        else:
            self.store.save(self.draft, self.directory)

    def _said(self) -> Any:
        given = {field: self.draft.get(field) for field in QUESTIONS if self.draft.given(field)}
        return given, dict(self.draft.typed), self.directory
