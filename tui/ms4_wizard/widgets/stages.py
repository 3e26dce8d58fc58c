"""The stages of a run with their states and times."""

from __future__ import annotations

from rich.text import Text
from textual.message import Message
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from ms4.config import STAGES
from ms4_wizard.watch.stages import Snapshot, Stage

MARKS = {
    "waiting": ("·", "dim"),
    "queued": ("○", "yellow"),
    "running": ("▶", "bold cyan"),
    "done": ("✓", "green"),
    "failed": ("✗", "bold red"),
    "stopped": ("■", "yellow"),
}
"""Of each state: a character, so that it shows without colours, and a style."""
SNAKEMAKE = "snakemake"
"""The last entry: Snakemake itself."""


def clock(seconds: float) -> str:
    """Seconds as `h:mm:ss` or `m:ss`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def line(stage: Stage, width: int) -> Text:
    """A stage in a line: mark, name, state or Slurm job, time."""
    mark, style = MARKS[stage.state]
    time = clock(stage.seconds) if stage.seconds is not None else ""
    state: str = "" if stage.state == "done" else stage.state
    if stage.slurm_job is not None:
        state = (
            f"job {stage.slurm_job}" if stage.state == "running" else f"{state} {stage.slurm_job}"
        )
    # The name is in the list's own colour: no other can be read on the bar of the chosen one, too.
    plain = " ".join(word for word in style.split() if word in ("bold", "dim"))
    text = Text.assemble((f"{mark} ", style), (f"{stage.name:<11}", plain), (state, "dim"))
    text.truncate(max(width - len(time) - 1, 0), pad=True)
    text.append(f" {time}")
    return text


class StageList(OptionList):
    """Up and down choose whose log is shown; until then it is that of the stage that runs."""

    DEFAULT_CSS = "StageList { height: 11; }"

    class Picked(Message):
        """Another log is to be shown: a stage's, or `snakemake`."""

        def __init__(self, name: str, by_hand: bool) -> None:
            super().__init__()
            self.name = name
            self.by_hand = by_hand

    def __init__(self, id: str | None = None) -> None:
        super().__init__(*(Option(name, id=name) for name in (*STAGES, SNAKEMAKE)), id=id)
        self.follows = True
        """It moves to the stage that runs."""
        self._moving = False
        self._seen: Snapshot | None = None
        self.border_title = "stages"

    def show(self, seen: Snapshot) -> None:
        """Draw another state of the run."""
        self._seen = seen
        self._draw()
        if self.follows and (current := seen.current) is not None:
            self._move_to(current.name)

    def on_resize(self) -> None:
        """The times stand at the right edge, wherever that is."""
        self._draw()

    def _draw(self) -> None:
        if self._seen is None:
            return
        width = max(self.scrollable_content_region.width - 2, 0)
        for stage in self._seen.stages:
            self._prompt(stage.name, line(stage, width))
        runner = self._seen.runner
        state = f"process {runner}" if runner is not None else ""
        self._prompt(SNAKEMAKE, Text.assemble("  ", (f"{SNAKEMAKE:<11}", ""), (state, "dim")))

    def _prompt(self, name: str, text: Text) -> None:
        if self.get_option(name).prompt != text:
            self.replace_option_prompt(name, text)

    def follow(self) -> None:
        """Show the stage that runs, from now on."""
        self.follows = True
        if self._seen is not None:
            self.show(self._seen)

    def _move_to(self, name: str) -> None:
        index = self.get_option_index(name)
        if index != self.highlighted:
            self.highlighted = index

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """Say so; one that it did not move to itself was picked by hand."""
        event.stop()
        name = str(event.option_id)
        current = self._seen.current if self._seen is not None else None
        by_hand = self._seen is not None and (current is None or name != current.name)
        self.post_message(self.Picked(name, by_hand))
