"""The wizard's screens, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from textual import on
from textual.app import SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen

from ms4_wizard.drafts import Kept
from ms4_wizard.go import Go
from ms4_wizard.palette import Commands
from ms4_wizard.preferences import Preferences
from ms4_wizard.screens.welcome import WelcomeScreen
from ms4_wizard.steps import STEPS
from ms4_wizard.themes import ThemedApp

if TYPE_CHECKING:  # configuration and planner come after the first frame
    from ms4_wizard.flow import Flow

OWN = {
    "machine": "machine.MachineScreen",
    "data": "data.DataScreen",
    "reasoning": "reasoning.ReasoningScreen",
    "memory": "memory.MemoryScreen",
    "adapters": "adapters.AdaptersScreen",
    "training": "training.TrainingScreen",
    "where": "where.WhereScreen",
}
"""Steps whose screen shows more than its questions. They are imported when they are needed, as is
everything that needs a configuration: the first frame waits for Textual alone."""


class WizardApp(ThemedApp):
    """Asks, shows what it costs, and writes the project; returns what to say then, or None."""

    TITLE = "ms4"
    CSS_PATH = "wizard.tcss"
    COMMANDS = {Commands}  # noqa: RUF012 - as Textual has it
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (70, "-middle"), (110, "-wide")]  # noqa: RUF012
    VERTICAL_BREAKPOINTS = [(0, "-low"), (30, "-high")]  # noqa: RUF012 - as Textual has them
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+q", "quit", "Quit", priority=True),
    ]

    def __init__(
        self,
        flow: Flow | Callable[[], Flow],
        *,
        welcome: bool = False,
        kept: Kept | None = None,
        preferences: Preferences | None = None,
    ) -> None:
        """
        Args:
            flow: the state of the session, or what makes it once the first screen is left.
            welcome: begin with the choice of what to begin with.
            kept: a draft that was found: it is offered there.
            preferences: how the screens look; None: as they come, and not kept.
        """
        super().__init__(preferences)
        self._make = flow if callable(flow) else None
        self._flow = None if callable(flow) else flow
        self._prepared = False
        self._welcome = welcome or kept is not None
        self._kept = kept

    @property
    def flow(self) -> Flow:
        """The state of the session."""
        if self._flow is None:
            assert self._make is not None  # noqa: S101 - one of both was given
            self._flow = self._make()
        return self._flow

    def on_mount(self) -> None:
        """A new project begins with the first question, one that exists with all its answers."""
        if self._welcome:
            self.push_screen(self._screen(-1))
            return
        self.prepare()
        self.push_screen(self._screen(len(STEPS) if self.flow.opened else 0))

    def on_ready(self) -> None:
        """The first screen has begun: once it is drawn, what the next ones need is prepared."""
        self.screen.call_after_refresh(self.prepare)

    def prepare(self) -> None:
        """Import what the questions need and look at the machine, beside the screen: the first
        frame waits for neither, nor for nvidia-smi."""
        if not self._prepared:
            self._prepared = True
            self.run_worker(self._look_at_the_machine, thread=True)

    async def on_unmount(self) -> None:
        """Nothing goes on looking at the data."""
        if self._flow is not None and self._flow.looker is not None:
            await self._flow.looker.close()

    def _look_at_the_machine(self) -> None:
        from ms4_wizard import costs
        from ms4_wizard.screens import machine, review  # noqa: F401 - the next ones

        if not costs.machine_is_known():
            costs.look_at_the_machine()
            self.call_from_thread(self._show_the_plan)

    def _show_the_plan(self) -> None:
        # The answer may be there before the screen is: that will find the machine known.
        from ms4_wizard.screens.step import PlanScreen

        screen = self.screen
        if isinstance(screen, PlanScreen) and screen.is_mounted:
            screen.machine_found()

    def _screen(self, number: int) -> Screen[Any]:
        if number < 0:
            flow = self._flow
            opened = flow.directory if flow is not None and flow.opened is not None else None
            return WelcomeScreen(self._kept, opened)
        if number >= len(STEPS):
            from ms4_wizard.screens.review import ReviewScreen

            return ReviewScreen(self.flow)
        key = STEPS[number].key
        if key not in OWN:
            from ms4_wizard.screens.step import StepScreen

            return StepScreen(self.flow, number)
        module, _, name = OWN[key].partition(".")
        kind = getattr(import_module(f"ms4_wizard.screens.{module}"), name)
        screen: Screen[Any] = kind(self.flow, number)
        return screen

    @on(Go)
    def _go(self, event: Go) -> None:
        self.go(event.number)

    def go(self, number: int) -> None:
        """Show a step, the review (after the last) or the welcome (before the first)."""
        while len(self.screen_stack) > 2:  # help, or another screen over a step
            self.pop_screen()
        # A palette in which Enter is pressed twice before it is gone closes what is below it, too.
        if len(self.screen_stack) < 2:
            self.push_screen(self._screen(number))
        else:
            self.switch_screen(self._screen(number))

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """What the command palette offers."""
        for number, step in enumerate(STEPS):
            yield SystemCommand(
                f"Go to: {step.title}", f"Screen {number + 1}", lambda n=number: self.go(n)
            )
        yield SystemCommand("Go to: Review", "All answers", lambda: self.go(len(STEPS)))
        yield SystemCommand("Go to: Welcome", "Another project", lambda: self.go(-1))
        yield SystemCommand("Light or dark", "Change the colours (Ctrl+T)", self._toggle)
        yield SystemCommand("Quit", "Leave; the answers stay as a draft (Ctrl+Q)", self._leave)
        if self.flow.opened is not None:
            yield SystemCommand("Watch the run", "Stages, loss and memory", self._watch)

    def _toggle(self) -> None:
        self.action_toggle_theme()

    def _leave(self) -> None:
        self.exit()

    def _watch(self) -> None:
        from ms4_wizard.screens.run import RunScreen

        directory = self.flow.opened or Path(self.flow.directory)
        profile = str(self.flow.draft.get("where.run"))
        self.push_screen(RunScreen(directory, start=False, profile=profile))
