"""Where to run: names of this cluster's partitions and accounts, and what a job may take there."""

from __future__ import annotations

from collections.abc import Iterable

from rich.text import Text
from textual.content import Content
from textual.suggester import SuggestFromList
from textual.widget import Widget
from textual.widgets import Input, Static

from ms4.errors import printable
from ms4_wizard import machine
from ms4_wizard.answers import ONE_GPU
from ms4_wizard.costs import Cost
from ms4_wizard.machine import Known, Partition
from ms4_wizard.screens.step import StepScreen
from ms4_wizard.targets import USUAL_HOURS
from ms4_wizard.widgets.plan import WARNING


def described(partition: Partition) -> str:
    """A partition in a line."""
    gpus = ", ".join(dict.fromkeys(partition.gpus)) or "no GPU"
    limit = f", at most {partition.limit}" if partition.limit else ""
    down = "" if partition.up else ", down"
    return f"{partition.name}{' (default)' if partition.default else ''}: {gpus}{limit}{down}"


class WhereScreen(StepScreen):
    """The machine, or a Slurm cluster, whose names complete as they are typed (→ takes one)."""

    def compose_extra(self) -> Iterable[Widget]:
        """What cannot be chosen, and why; what the cluster has."""
        yield Static("", id="fixed", markup=False)
        yield Static("", id="cluster", markup=False)

    def on_mount(self) -> None:
        """Names of the cluster complete."""
        slurm = Known.machine.slurm if Known.machine is not None else None
        if slurm is not None:
            for name, words in (
                ("partition", [partition.name for partition in slurm.partitions]),
                ("account", list(slurm.accounts)),
            ):
                line = self.query_one(f"#answer-where-{name} Input", Input)
                line.suggester = SuggestFromList(words)

    def show_extra(self, found: Cost | str) -> None:
        """The cluster's partitions, and what of the answers would not run there."""
        slurm_chosen = self.flow.draft.get("where.run") == "slurm"
        fixed = self.query_one("#fixed", Static)
        fixed.display = slurm_chosen
        fixed.update(Content.assemble(("GPUs 1, nodes 1", "bold"), f": {ONE_GPU}."))
        told = Text()
        slurm = Known.machine.slurm if Known.machine is not None else None
        if slurm_chosen and slurm is not None:
            for fault in self._faults(slurm):
                told.append(f"{printable(fault)}\n", WARNING)
            if slurm.partitions:
                told.append("Partitions here:\n", "bold")
            for partition in slurm.partitions:
                told.append(f"  {printable(described(partition))}\n")
        elif slurm_chosen and Known.machine is not None:
            told.append("No Slurm answers on this machine: names are not checked.", "dim")
        self.query_one("#cluster", Static).update(told)

    def _faults(self, slurm: machine.Slurm) -> Iterable[str]:
        get = self.flow.draft.get
        name = get("where.partition")
        chosen = [p for p in slurm.partitions if (p.name == name if name else p.default)]
        if name and slurm.partitions and not chosen:
            yield f"This cluster has no partition {name}."
        for partition in chosen:
            if get("run.device") != "cpu" and not partition.gpus:
                yield f"{partition.name} has no GPU."
            limit, wanted = machine.hours(partition.limit), str(get("where.hours") or USUAL_HOURS)
            if limit is not None and wanted.isdigit() and int(wanted) > limit:
                yield f"{partition.name} allows {limit} hours: {wanted} would not start."
            account = get("where.account")
            if account and partition.accounts and account not in partition.accounts:
                yield f"{partition.name} does not take the account {account}."
