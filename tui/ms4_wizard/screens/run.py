"""The screen of a project's run: starts or attaches to it, shows what it does, stops it.

It only shows what lies in files, and what it starts does not depend on it: it can be left and
opened again at any time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import psutil
from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Grid, Horizontal, Vertical
from textual.screen import ModalScreen, Screen
from textual.widgets import Button, Footer, RichLog, Static
from textual.worker import Worker, WorkerState

from ms4.errors import Ms4Error, printable
from ms4_wizard.watch import control
from ms4_wizard.watch.follow import Follower
from ms4_wizard.watch.snakemake_log import DIRECTORY
from ms4_wizard.watch.stages import LAUNCHED, Snapshot, Watcher
from ms4_wizard.widgets.plot import ExpertLoad, Plot
from ms4_wizard.widgets.stages import SNAKEMAKE, StageList, clock

EVERY_S = 1.0
"""Seconds between two looks."""
LOG_LINES = 2000
"""Lines of a log that are kept on the screen."""
PACE = 20
"""Steps whose median time says how long the rest will take."""


class StopScreen(ModalScreen[bool]):
    """Asks before it stops the run."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Stop"),
        Binding("n,escape", "answer(False)", "Let it run"),
    ]

    def compose(self) -> ComposeResult:
        with Vertical(id="question"):
            yield Static(
                "Stop the run? Training saves a checkpoint after the step that it is in; Run goes "
                "on from there.",
                markup=False,
            )
            with Horizontal():
                yield Button("Let it run (n)", id="no", compact=True)
                yield Button("Stop (y)", id="yes", variant="warning", compact=True)

    def action_answer(self, answer: bool) -> None:
        """Close with the answer."""
        self.dismiss(answer)

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id == "yes")


class RunScreen(Screen[Snapshot | None]):
    """Shows stages, the log of one, and the training's curves."""

    CSS_PATH = "run.tcss"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (110, "-wide")]  # noqa: RUF012 - as Textual has it
    VERTICAL_BREAKPOINTS = [(0, "-low"), (36, "-high")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "start", "Run"),
        Binding("s", "stop", "Stop"),
        Binding("f", "follow", "Follow"),
        Binding("l", "enlarge_log", "Log"),
        Binding("q,escape", "leave", "Leave"),
    ]

    def __init__(
        self,
        root: Path,
        profile: str,
        start: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            root: the project's directory.
            profile: the Snakemake profile that it is started with.
            start: start it at once, if nothing runs.
            now: seconds since the epoch.
        """
        super().__init__()
        self.root = root.resolve()
        self.profile = profile
        self._start_at_once = start
        self._now = now
        self._watcher = Watcher(self.root)
        self.seen: Snapshot | None = None
        """What the last look saw."""
        self._process: psutil.Popen | None = None
        self._stopper: control.Stopper | None = None
        self._fault = ""
        """Why the last look that failed did."""
        self._log = Follower(self.root / "logs/fetch.log")
        self._log_of = ""
        self._log_empty = True

    def compose(self) -> ComposeResult:
        with Horizontal(id="head"):
            yield Static(f"ms4  ·  {printable(self.root.name)}", id="what", markup=False)
            yield Static("", id="says", markup=False)
        with Container(id="top"):
            yield StageList(id="stages")
            with Vertical(id="training"):
                yield Static("", id="progress", markup=False)
                with Grid(id="curves"):
                    yield Plot("loss", "nats", colour="cyan", id="loss")
                    yield Plot("learning rate", colour="green", id="learning_rate")
                    yield Plot("tokens/s", colour="yellow", id="tokens_per_s")
                    yield Plot("memory", "GiB", colour="magenta", id="memory_gib")
                yield ExpertLoad(id="experts")
        log = RichLog(id="log", max_lines=LOG_LINES, wrap=False, markup=False, highlight=False)
        log.border_title = "log"
        yield log
        yield Footer()

    def on_mount(self) -> None:
        """Look at once, and every second from then on."""
        self._look()
        self.set_interval(EVERY_S, self._look)

    # Looking. Files may lie on a slow network: they are read beside the screen.

    @work(thread=True, exclusive=True, group="look", exit_on_error=False)
    def _read(self) -> None:
        if self._process is not None:
            self._process.poll()  # or it would stay a zombie, which looks alive
        seen = self._watcher.look(self._now())
        fault = ""
        if self._stopper is not None and seen.alive:
            try:
                self._stopper.stop(seen)
            except Ms4Error as error:
                self._stopper, fault = None, str(error)
        self.app.call_from_thread(self._show, seen, fault)

    def on_worker_state_changed(self, event: Worker.StateChanged) -> None:
        """Say once that a look failed: what stands here is old then."""
        if event.state is WorkerState.ERROR and str(event.worker.error) != self._fault:
            self._fault = str(event.worker.error)
            self.notify(printable(f"The run cannot be looked at: {self._fault}"), severity="error")

    def _look(self) -> None:
        # A look that takes longer than the interval is waited for, not begun again.
        if not any(worker.group == "look" and worker.is_running for worker in self.workers):
            self._read()

    def _show(self, seen: Snapshot, fault: str = "") -> None:
        if not self.is_attached:
            return
        first, self.seen = self.seen is None, seen
        if not seen.alive:
            self._stopper = None
        says = "stopping" if self._stopper is not None else seen.says
        self.query_one("#says", Static).update(says)
        self.query_one("#progress", Static).update(self._progress(seen))
        for plot in self.query(Plot):
            values = seen.metrics.curves[str(plot.id)]
            plot.show(values, self._note(seen) if plot.id == "memory_gib" else "")
        self.query_one(ExpertLoad).show(seen.metrics.expert_load)
        self.query_one(StageList).show(seen)
        self._show_log()
        self.refresh_bindings()
        if fault:
            self.notify(printable(fault), severity="error", timeout=10)
        if first and self._start_at_once and not seen.alive:
            self.action_start()

    def _note(self, seen: Snapshot) -> str:
        return f"planned {seen.planned_gib:.3g}" if seen.planned_gib is not None else ""

    def _progress(self, seen: Snapshot) -> Text:
        steps, total = seen.metrics.steps, seen.steps
        if not steps:
            return Text("training: no step yet", "dim")
        text = Text.assemble("training: step ", (f"{steps[-1]:,}", "bold"))
        if total is not None:
            text.append(f" of {total:,} ({steps[-1] / total:.0%})")
            at_work = any(
                stage.name == "train" and stage.state == "running" for stage in seen.stages
            )
            pace = [s for s in seen.metrics.curves["seconds"][-PACE:] if math.isfinite(s)]
            if at_work and pace and total > steps[-1]:
                left = (total - steps[-1]) * statistics.median(pace)
                text.append(f", {clock(left)} left", "bold")
        return text

    # The log.

    @on(StageList.Picked)
    def _picked(self, event: StageList.Picked) -> None:
        if event.by_hand:
            self.query_one(StageList).follows = False
        if event.name != self._log_of:
            self._log_of = event.name
            self._follow_file(self._log_file())
            self._show_log()

    def _log_file(self) -> Path:
        if self._log_of != SNAKEMAKE:
            return self.root / "logs" / f"{self._log_of}.log"
        # What was started from here prints more than Snakemake's own log has: why it did not start.
        logs = [self.root / LAUNCHED, *sorted((self.root / DIRECTORY).glob("*.log"))[-1:]]
        there = [path for path in logs if path.is_file()]
        return max(there, key=lambda path: path.stat().st_mtime, default=logs[0])

    def _follow_file(self, path: Path) -> None:
        self._log, self._log_empty = Follower(path), True
        view = self.query_one("#log", RichLog)
        view.clear()
        view.border_title = printable(str(path.relative_to(self.root)))

    def _show_log(self) -> None:
        if not self._log_of:
            return
        if self._log_of == SNAKEMAKE and (path := self._log_file()) != self._log.path:
            self._follow_file(path)
        view = self.query_one("#log", RichLog)
        lines, anew = self._log.read()
        if anew or (lines and self._log_empty):
            view.clear()
            self._log_empty = True
        if lines:
            self._log_empty = False
            view.write(Text("\n".join(map(printable, lines))))
        elif self._log_empty and not view.lines:
            view.write(Text("Nothing is written there yet.", "dim"))

    # What it does.

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Run only what does not run, stop only what does."""
        alive = self.seen is not None and self.seen.alive
        if action == "start":
            return None if alive or self.seen is None else True
        if action == "stop":
            return True if alive and self._stopper is None else None
        return True

    def action_start(self) -> None:
        """Start Snakemake, or take it up again."""
        if self.seen is None or self.seen.alive:
            return
        try:
            self._process = control.start(self.root, self.profile)
        except Ms4Error as error:
            self.notify(printable(str(error)), severity="error", timeout=10)
            return
        self._watcher.started(self._process)
        self.query_one(StageList).follow()
        self.notify(f"snakemake --profile {self.profile}, in the background")
        self._look()

    def action_stop(self) -> None:
        """Ask, and stop it."""

        def answered(yes: bool | None) -> None:
            if yes:
                self._stopper = control.Stopper(self.root)
                self._look()

        self.app.push_screen(StopScreen(), answered)

    def action_follow(self) -> None:
        """Show the log of the stage that runs."""
        self.query_one(StageList).follow()

    def action_enlarge_log(self) -> None:
        """Give the log the whole screen, or take that back."""
        self.toggle_class("-log")

    def action_leave(self) -> None:
        """Close the screen, with what was seen last; what runs goes on."""
        self.dismiss(self.seen)
