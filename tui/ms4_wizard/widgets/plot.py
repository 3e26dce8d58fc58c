"""Curves in a terminal, of braille characters: two dots in width and four in height a cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from rich.console import RenderableType
from rich.text import Text
from textual.app import RenderResult
from textual.widget import Widget

_BLANK = 0x2800
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Of a braille character, by row and column."""

Spans = list[tuple[float, float] | None]


def spans(values: Sequence[float], columns: int, means: bool = False) -> Spans:
    """The lowest and highest of the values that fall into each column; None where there are none.

    Fewer values than columns are joined by straight lines. NaN and infinities are passed over.

    Args:
        values: at equal distances from each other.
        columns: how many there are to be.
        means: take their mean for both: a line without its noise.
    """
    count = len(values)
    found: Spans = [None] * columns
    if count > columns:
        for column in range(columns):
            part = values[column * count // columns : (column + 1) * count // columns]
            numbers = [value for value in part if math.isfinite(value)]
            if numbers and means:
                mean = sum(numbers) / len(numbers)
                found[column] = mean, mean
            elif numbers:
                found[column] = min(numbers), max(numbers)
        return found
    for number, value in enumerate(values):
        place = number * (columns - 1) / max(count - 1, 1)
        if math.isfinite(value):
            found[round(place)] = (value, value)
    known = [column for column, span in enumerate(found) if span is not None]
    for left, right in pairwise(known):
        start, end = found[left], found[right]
        if start is None or end is None or right - left > 2 * (columns - 1) / max(count - 1, 1):
            continue  # a gap in the values stays one
        for column in range(left + 1, right):
            share = (column - left) / (right - left)
            between = start[0] + share * (end[0] - start[0])
            found[column] = (between, between)
    return found


def limits(values: Sequence[float]) -> tuple[float, float] | None:
    """The lowest and highest finite value, if there is one."""
    numbers = [value for value in values if math.isfinite(value)]
    return (min(numbers), max(numbers)) if numbers else None


def braille(values: Sequence[float], width: int, height: int) -> list[str]:
    """A curve as lines of text, from the lowest value at the bottom to the highest at the top.

    Args:
        values: at equal distances; NaN leaves a gap.
        width: cells of a line.
        height: lines.
    """
    # In a single line there is no room for noise.
    columns = spans(values, 2 * width, means=height == 1)
    found = limits([end for span in columns if span is not None for end in span])
    cells = [[_BLANK] * width for _ in range(height)]
    if found is not None and width > 0 and height > 0:
        low, high = found
        dots = 4 * height - 1
        scale = dots / (high - low) if high > low else 0.0
        before: int | None = None
        for column, span in enumerate(columns):
            if span is None:
                before = None
                continue
            if scale:
                first, last = (round((value - low) * scale) for value in span)
            else:
                first = last = dots // 2
            if before is not None:  # no hole where the curve is steep
                first, last = min(first, before), max(last, before)
            middle = round(((span[0] + span[1]) / 2 - low) * scale) if scale else first
            before = middle
            for dot in range(first, last + 1):
                row, of_row = divmod(dots - dot, 4)
                cells[row][column // 2] |= _DOTS[of_row][column % 2]
    return ["".join(map(chr, row)) for row in cells]


BLOCKS = " ▁▂▃▄▅▆▇█"


def bars(values: Sequence[float], width: int, height: int) -> list[str]:
    """Columns of block characters from zero up to the largest value.

    Args:
        values: not negative; where they are more than `width`, each column shows the largest of
            its own.
        width: cells at most.
        height: lines.
    """
    count = len(values)
    columns = min(width, count)
    if not columns or height <= 0:
        return [""] * max(height, 0)
    tops = [max(values[c * count // columns : (c + 1) * count // columns]) for c in range(columns)]
    highest = max(tops) or 1.0
    eighths = [math.ceil(top / highest * 8 * height) for top in tops]
    lines = []
    for row in reversed(range(height)):
        lines.append("".join(BLOCKS[min(8, max(0, n - 8 * row))] for n in eighths))
    return lines


def short(value: float) -> str:
    """A number in seven characters at most."""
    if not math.isfinite(value):
        return "–"
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


class Plot(Widget):
    """A curve with its name and latest value; where there is one line for it, a small one."""

    DEFAULT_CSS = "Plot { height: 1fr; }"

    def __init__(self, name: str, unit: str = "", *, colour: str = "cyan", id: str | None = None):
        super().__init__(id=id)
        self._title = name
        self._unit = f" {unit}" if unit else ""
        self._colour = colour
        self._values: Sequence[float] = ()
        self._note = ""

    def show(self, values: Sequence[float], note: str = "") -> None:
        """Draw other values.

        Args:
            values: one a step.
            note: what to say beside the latest.
        """
        self._values, self._note = values, note
        self.refresh()

    def render(self) -> RenderResult:
        """The curve, as large as there is room."""
        width, height = self.size
        drawn: RenderableType = self._line(width) if height < 3 else self._picture(width, height)
        return drawn

    def _head(self) -> Text:
        last = next((v for v in reversed(self._values) if math.isfinite(v)), math.nan)
        head = Text.assemble(f"{self._title} ", (short(last) + self._unit, "bold"))
        if self._note:
            head.append(f"  {self._note}", "dim")
        return head

    def _line(self, width: int) -> Text:
        head = self._head()
        head.truncate(width)
        room = min(width - 30, width - len(head) - 1)
        if room >= 4:
            head.pad_right(width - room - len(head))
            head.append(braille(self._values, room, 1)[0], self._colour)
        return head

    def _picture(self, width: int, height: int) -> Text:
        found = limits(self._values)
        labels = (short(found[1]), short(found[0])) if found else ("", "")
        left = max(map(len, labels), default=0) + 1
        head = self._head()
        head.truncate(width)
        lines = [head]
        drawn = braille(self._values, max(width - left, 1), height - 1)
        for row, text in enumerate(drawn):
            label = labels[0] if row == 0 else labels[1] if row == height - 2 else ""
            lines.append(Text.assemble((label.rjust(left - 1) + " ", "dim"), (text, self._colour)))
        return Text("\n").join(lines)


class ExpertLoad(Widget):
    """How evenly the routers use the experts."""

    DEFAULT_CSS = "ExpertLoad { height: 1fr; }"

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._shares: Sequence[float] = ()

    def show(self, shares: Sequence[float]) -> None:
        """Draw other shares: of all rows of a step, by expert."""
        self._shares = shares
        self.refresh()

    def render(self) -> RenderResult:
        """Bars by expert, and the extremes in words."""
        width, height = self.size
        head = load_in_words(self._shares)
        head.truncate(width)
        if height < 2:
            room = min(len(self._shares), width - len(head) - 1)
            if room >= 4:
                head.append(f" {bars(self._shares, room, 1)[0]}", "magenta")
            return head
        lines = bars(self._shares, width, min(height - 1, 8))
        return Text("\n").join([head, *(Text(line, "magenta") for line in lines)])


def load_in_words(shares: Sequence[float]) -> Text:
    """The busiest and the idlest expert, as multiples of an even share."""
    if not shares:
        return Text.assemble("experts ", ("–", "bold"))
    even = sum(shares) / len(shares) or 1.0
    busiest, idlest = max(shares) / even, min(shares) / even
    text = Text.assemble(
        "experts ", (f"{idlest:.2g} to {busiest:.2g}", "bold"), (" × an even share", "dim")
    )
    if idle := sum(1 for share in shares if not share):
        text.append(f", {idle} idle", "yellow")
    return text
