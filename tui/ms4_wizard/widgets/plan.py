"""What the answers cost, as a picture: one stacked bar against the budget, and time and energy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from textual.widgets import Static

from ms4.device import GIB
from ms4.plan import size
from ms4_wizard.costs import Cost, Remedy
from ms4_wizard.speed import Speed, duration

# Told apart without colours, too: neighbours differ in their character.
LOOKS = (
    ("█", "#4f86c6"),
    ("▓", "#2a9d8f"),
    ("▒", "#b08900"),
    ("█", "#8e6bbf"),
    ("▓", "#c2703d"),
    ("▒", "#6b8e23"),
    ("█", "#3f8fa8"),
    ("▓", "#a0588f"),
)
OTHER = ("░", "#808080")
WARNING = "yellow"
"""By its name: each theme has its own, see `themes`. Textual's `$text-warning` is weak on light."""
OVER = ("╳", "bold red")
FREE = ("·", "dim")
COMPACT_ROWS = 6
"""Components that are named on a low screen; the smallest together are `other`."""
HIGH_ROWS = 12
LOW = 30
"""Rows of a screen that is low."""


def warning(text: str) -> Text:
    """A sentence in the colour of warnings, as a widget's content: of a whole text's style Textual
    would take the name for that of CSS, which no theme changes."""
    return Text.assemble((text, WARNING))


@dataclass(frozen=True)
class Part:
    """A component as it is drawn."""

    name: str
    amount: int
    look: tuple[str, str]
    """Character and colour."""


def parts(components: Mapping[str, int], rows: int) -> list[Part]:
    """The components that are named, in their order, and the rest as `other`."""
    present = {name: amount for name, amount in components.items() if amount > 0}
    largest = sorted(present, key=lambda name: -present[name])
    named = set(largest if len(largest) <= rows else largest[: rows - 1])
    found = [
        Part(name, present[name], LOOKS[number % len(LOOKS)])
        for number, name in enumerate(name for name in present if name in named)
    ]
    rest = sum(amount for name, amount in present.items() if name not in named)
    return [*found, Part("other", rest, OTHER)] if rest else found


def bar(shown: list[Part], budget: int | None, width: int) -> Text:
    """The stacked bar: as wide as the budget, or as what is needed if that is more.

    Args:
        shown: what is stacked.
        budget: bytes; None: not known.
        width: cells.
    """
    peak = sum(part.amount for part in shown)
    scale = max(peak, budget or 0, 1)
    # What does not fit takes a cell at least.
    limit = width if budget is None else round(width * budget / scale)
    if budget is not None and peak > budget:
        limit = min(limit, width - 1)
    line = Text()
    done, at = 0, 0
    for part in shown:
        done += part.amount
        end = round(width * done / scale)
        inside = max(0, min(end, limit) - at)
        line.append(part.look[0] * inside, part.look[1])
        line.append(OVER[0] * (end - at - inside), OVER[1])
        at = max(at, end)
    line.append(FREE[0] * (width - at), FREE[1])
    return line


def scale_line(peak: int, budget: int | None, width: int) -> Text:
    """What stands under the bar: where the budget ends."""
    if budget is None:
        return Text("no budget is given", "dim")
    told = f"budget {size(budget)}"
    if peak <= budget:
        return Text(f"{told} ┘".rjust(width), "dim")
    place = min(width - 1, round(width * budget / peak))
    if place >= cell_len(told) + 1:
        return Text(f"{told} ┘".rjust(place), "red")
    return Text(" " * max(0, place - 1) + f"└ {told}", "red")


def verdict(found: Cost) -> Text:
    """Whether it fits, in words."""
    if found.budget is None:
        return Text("No budget is given.", WARNING)
    left = found.budget - found.plan.peak
    if left >= 0:
        return Text(f"fits: {size(left)} left of {size(found.budget)}", "green")
    return Text(f"does not fit: {size(-left)} more than {size(found.budget)}", "bold red")


def speed_rows(speed: Speed) -> Iterator[tuple[str, str, str]]:
    """Name, figure and where it is from, of each figure beside the memory."""
    if speed.tokens_per_s is None:
        yield "tokens/s", "?", speed.source
    else:
        yield "tokens/s", f"{speed.tokens_per_s:,.0f}", speed.kind
    if speed.steps is None:
        yield "steps", "?", "by the data"
    else:
        yield "steps", f"{speed.steps:,}", speed.steps_kind
    if speed.hours is not None:
        yield "time", duration(speed.hours), speed.kind
    if speed.kwh is not None:
        yield "energy", f"{speed.kwh:,.2f} kWh", "estimate"


class Picture:
    """The panel as something to render, as wide as it is given room."""

    def __init__(
        self, found: Cost, speed: Speed | None, rows: int, fix: Remedy | str | None, wordy: bool
    ) -> None:
        self._found, self._speed, self._rows, self._fix = found, speed, rows, fix
        self._wordy = wordy

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found, width = self._found, options.max_width
        shown = parts(found.plan.components, self._rows)
        yield Text(found.device if self._wordy else found.device.split(" (")[0], "dim")
        line = bar(shown, found.budget, width)
        yield line
        if self._wordy:
            yield line
        yield scale_line(found.plan.peak, found.budget, width)
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column()
        table.add_column(ratio=1)
        table.add_column(justify="right")
        for part in shown:
            table.add_row(Text(*part.look), part.name, f"{part.amount / GIB:.2f}")
        whole = Text(f"{found.plan.peak / GIB:.2f}", "bold")
        table.add_row("", Text("at its fullest, GiB", "bold"), whole)
        yield table
        yield verdict(found)
        if isinstance(self._fix, Remedy):
            yield Text.assemble(
                ("Ctrl+F", "bold reverse"), f" {self._fix.told}: {size(self._fix.peak)}"
            )
        elif self._fix is not None:
            yield Text(self._fix, WARNING)
        if self._wordy:
            yield Text("")
        if self._speed is not None:
            table = Table.grid(padding=(0, 1))
            table.add_column(no_wrap=True)
            table.add_column(justify="right", no_wrap=True)
            table.add_column(style="dim")
            for row in speed_rows(self._speed):
                table.add_row(*row)
            yield table
            if self._speed.tokens_per_s is not None:
                yield Text(
                    f"{self._speed.kind}: {self._speed.source}; steps of "
                    f"{self._speed.tokens_per_step:,} tokens",
                    "dim",
                )
        yield Text(f"host RAM {size(found.plan.host)}, disk {size(found.plan.disk)}", "dim")


class PlanPanel(Static):
    """Shows a plan, or why there is none."""

    def show(
        self, found: Cost | str, speed: Speed | None = None, fix: Remedy | str | None = None
    ) -> None:
        """Redraw.

        Args:
            found: the plan, or a sentence.
            speed: what stands beside it.
            fix: what makes it fit, or a sentence about that.
        """
        if isinstance(found, str):
            self.update(warning(found))
            return
        wordy = self.app.size.height >= LOW
        rows = HIGH_ROWS if wordy else COMPACT_ROWS - (fix is not None)
        self.update(Picture(found, speed, rows, fix, wordy))
