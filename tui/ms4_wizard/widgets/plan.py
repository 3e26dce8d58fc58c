"""The memory plan beside the answers."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text
from textual.widgets import Static

from ms4.device import GIB
from ms4.plan import size
from ms4_wizard.costs import Cost

BAR = 26
"""Cells of the bar."""
SMALL = 0.01
"""Components below this share of the peak are shown together."""


def bar(peak: int, budget: int) -> Text:
    """The peak as a part of the budget, both in bytes; red where it is more."""
    share = peak / max(budget, 1)
    filled = min(BAR, max(1, round(BAR * share)))
    style = "green" if peak <= budget else "red"
    return Text.assemble(("━" * filled, style), ("━" * (BAR - filled), "dim"), f" {share:.0%}")


def picture(found: Cost) -> Table:
    """The plan as a small table: component and GiB."""
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(ratio=1)
    table.add_column(justify="right")
    small = 0
    for name, amount in found.plan.components.items():
        if amount < SMALL * found.plan.peak:
            small += amount
        else:
            table.add_row(name, f"{amount / GIB:.2f}")
    if small:
        table.add_row("other", f"{small / GIB:.2f}")
    table.add_row(Text("at its fullest, GiB", "bold"), Text(f"{found.plan.peak / GIB:.2f}", "bold"))
    return table


def verdict(found: Cost) -> Text:
    """Whether it fits, in words."""
    if found.budget is None:
        return Text("No budget is given.", "yellow")
    left = found.budget - found.plan.peak
    if left >= 0:
        return Text(f"fits: {size(left)} left of {size(found.budget)}", "green")
    return Text(f"does not fit: {size(-left)} more than {size(found.budget)}", "bold red")


class PlanPanel(Static):
    """Shows a plan, or why there is none."""

    BORDER_TITLE = "memory plan"

    def show(self, found: Cost | str) -> None:
        """Redraw with a plan, or with a sentence."""
        if isinstance(found, str):
            self.update(Text(found, "yellow"))
            return
        table = Table.grid(expand=True)
        table.add_row(Text(found.device, "dim"))
        table.add_row("")
        table.add_row(picture(found))
        table.add_row("")
        if found.budget is not None:
            table.add_row(bar(found.plan.peak, found.budget))
        table.add_row(verdict(found))
        table.add_row(
            Text(f"host RAM {size(found.plan.host)}, disk {size(found.plan.disk)}", "dim")
        )
        self.update(table)
