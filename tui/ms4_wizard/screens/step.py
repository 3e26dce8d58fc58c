"""The screen of a step: its questions, and what they cost beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.screen import Screen
from textual.timer import Timer
from textual.widget import Widget
from textual.widgets import Button, Footer, Input

from ms4_wizard.costs import Cost, Remedy
from ms4_wizard.flow import Flow
from ms4_wizard.go import Go
from ms4_wizard.pages import page
from ms4_wizard.screens.help import HelpScreen
from ms4_wizard.steps import STEPS
from ms4_wizard.widgets.answer import CONTROLS, Answer, HelpWanted
from ms4_wizard.widgets.plan import PlanPanel
from ms4_wizard.widgets.title import Title

REMEDY_AFTER = 0.15
"""Seconds without a key stroke before what would make a run fit is looked for."""


class PlanScreen(Screen[None]):
    """A screen with the plan beside it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+f", "fit", "Make it fit", priority=True),
    ]

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow
        self._remedy: Remedy | str | None = None
        self._timer: Timer | None = None
        self._searches = 0

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer a change only where there is one."""
        if action == "fit":
            return isinstance(self._remedy, Remedy)
        return True

    def show_plan(self) -> Cost | str:
        """Redraw the plan at once, and look for what would make it fit when the keys rest."""
        found = self.flow.cost()
        self._forget_remedy()
        self._draw(found)
        if not isinstance(found, str) and found.fits is False:
            self._timer = self.set_timer(REMEDY_AFTER, self._look_for_remedy)
        return found

    def _draw(self, found: Cost | str) -> None:
        speed = None if isinstance(found, str) else self.flow.speed(found)
        for panel in self.query(PlanPanel):
            panel.show(found, speed, self._remedy)

    def _forget_remedy(self) -> None:
        self._searches += 1
        if self._timer is not None:
            self._timer.stop()
            self._timer = None
        if self._remedy is not None:
            self._remedy = None
            self.refresh_bindings()

    def _look_for_remedy(self) -> None:
        self._timer = None
        search = self.flow.remedy()
        if search is not None:
            self._searches += 1
            number = self._searches
            # Up to two thousand plans: keys are answered meanwhile.
            self.run_worker(lambda: self._search(search, number), thread=True)

    def _search(self, search: Callable[[], Remedy | str], number: int) -> None:
        found = search()
        self.app.call_from_thread(self._show_remedy, found, number)

    def _show_remedy(self, found: Remedy | str, number: int) -> None:
        # It belongs to the answers of its time.
        if number == self._searches and self.is_attached:
            self._remedy = found
            self._draw(self.flow.cost())
            self.refresh_bindings()

    def action_fit(self) -> None:
        """Take the cheapest change that makes the run fit."""
        if isinstance(self._remedy, Remedy):
            for field, value in self._remedy.values.items():
                self.flow.draft.set(field, value)
            self.answers_changed()

    def answers_changed(self) -> None:
        """The draft has other answers: keep and show them."""
        self.flow.save()
        self.show_plan()

    def machine_found(self) -> None:
        """The machine is known now: there is a plan."""
        self.answers_changed()

    def on_resize(self) -> None:
        """What is shown depends on the room."""
        self.call_after_refresh(self.show_plan)


class StepScreen(PlanScreen):
    """Asks the questions of one step."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+n", "next", "Next"),
        Binding("escape", "back", "Back"),
        Binding("f1", "help", "Help", key_display="?/F1"),
        Binding("question_mark", "help", "Help", show=False),
        # Nothing at the right takes the focus: without these it would scroll by a mouse alone.
        Binding("pagedown", "side(1)", "More at the right", show=False, priority=True),
        Binding("pageup", "side(-1)", "Back up at the right", show=False, priority=True),
    ]

    def __init__(self, flow: Flow, number: int) -> None:
        super().__init__(flow)
        self.number = number
        self.step = STEPS[number]
        self._shown: set[str] = set()
        """Fields whose faults are shown: those that were touched, and all after Next."""

    def compose(self) -> ComposeResult:
        yield Title(self.step.title, self.number)
        with Horizontal(id="body"):
            with VerticalScroll(id="questions", can_focus=False):
                for question in self.step.questions:
                    yield Answer(question, self.flow.draft)
                yield from self.compose_extra()
            with VerticalScroll(id="side", can_focus=False):
                yield from self.compose_side()
        with Horizontal(id="buttons"):
            yield Button("Back", id="back", disabled=self.number == 0, compact=True)
            yield Button("Next", id="next", variant="primary", compact=True)
        yield Footer()

    def compose_extra(self) -> Iterable[Widget]:
        """What stands below the questions."""
        return ()

    def compose_side(self) -> Iterable[Widget]:
        """What stands beside the questions."""
        yield PlanPanel(id="plan")

    def show_extra(self, found: Cost | str) -> None:
        """Redraw what is this screen's own, after each change."""

    def explain(self, field: str) -> list[tuple[str, str]]:
        """Paragraphs of this screen's own for the longer page of a question."""
        return []

    def on_screen_resume(self) -> None:
        """Another screen may have changed what this one shows: the plan, what is asked."""
        self._refresh()
        self.flow.look(self.app)  # a draft that is gone on with; another model's tokenizer
        # Giving the first control the focus scrolled to it before there was a layout, and its
        # question out of sight.
        self.call_after_refresh(self.query_one("#questions").scroll_home, animate=False)

    def look_changed(self) -> None:
        """More is known of the data: steps, and what is computed, follow from it."""
        looker = self.flow.looker
        if looker is not None and looker.look is not None and looker.look.state == "done":
            self.answers_changed()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """What is at the right scrolls where it is cut; else the keys are the controls'."""
        if action == "side":
            return any(side.max_scroll_y > 0 for side in self.query("#side"))
        return super().check_action(action, parameters)

    def action_side(self, direction: int) -> None:
        """Scroll what stands at the right, by half of what is seen of it."""
        side = self.query_one("#side")
        side.scroll_relative(y=direction * max(1, side.size.height // 2), animate=False)

    @on(Answer.Changed)
    def _changed(self, event: Answer.Changed) -> None:
        self._shown.add(event.question.field)
        self.answers_changed()

    def answers_changed(self) -> None:
        """The draft has other answers: keep and show them."""
        self.flow.save()
        self._refresh()

    def _refresh(self) -> None:
        faults = self.flow.faults()
        for answer in self.query(Answer):
            question = answer.question
            answer.display = self.flow.draft.asks(question)
            answer.show_answer()
            shown = question.field in self._shown
            answer.show_fault(faults.get(question.field, "") if shown else "")
        self.show_extra(self.show_plan())

    @on(Input.Submitted)
    def _submitted(self) -> None:
        self.focus_next()

    @on(HelpWanted)
    def _help_wanted(self) -> None:
        self.action_help()

    def action_help(self) -> None:
        """The longer page of the question that has the focus, or of all of them."""
        asked = [a for a in self.query(Answer) if a.display]
        answers = [a for a in asked if a.has_focus_within] or asked
        paragraphs: list[tuple[str, str]] = []
        for answer in answers:
            own = [("reason", text) for _, text in self.explain(answer.question.field)]
            told = page(answer.question)
            paragraphs += [*told[:2], *own, *told[2:]]
        self.app.push_screen(HelpScreen(paragraphs))

    @on(Button.Pressed, "#next")
    def action_next(self) -> None:
        """Go on, if the answers of this step are good."""
        asked = [a for a in self.query(Answer) if self.flow.draft.asks(a.question)]
        self._shown |= {answer.question.field for answer in asked}
        self._refresh()
        faults = self.flow.faults(files=True)
        for answer in asked:
            if message := faults.get(answer.question.field):
                answer.show_fault(message)
        wrong = [answer for answer in asked if answer.question.field in faults]
        if wrong:
            wrong[0].query(CONTROLS).first().focus()
            return
        self.post_message(Go(self.number + 1))

    @on(Button.Pressed, "#back")
    def action_back(self) -> None:
        """Go back; what was typed stays."""
        if self.number > 0:
            self.post_message(Go(self.number - 1))
