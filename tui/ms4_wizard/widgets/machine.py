"""What was found of the machine, and the list of machines to plan for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from rich.table import Table
from rich.text import Text
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from ms4.errors import printable
from ms4_wizard.draft import Draft
from ms4_wizard.machine import Machine, Slurm
from ms4_wizard.targets import Target, targets
from ms4_wizard.widgets.plan import warning


def facts(found: Machine) -> Iterator[tuple[str, str]]:
    """What the machine has: a name and a few words each."""
    if found.gpus:
        for gpu in found.gpus:
            yield "GPU", f"{gpu.name}, {gpu.gib:.1f} GiB" if gpu.gib is not None else gpu.name
    else:
        yield "GPU", f"none ({found.gpu_fault})"
    if found.cuda is not None:
        yield "CUDA", found.cuda
    yield "CPU", f"{found.cores} cores, {found.cpu}"
    yield "RAM", f"{found.memory_gib:.0f} GiB, {found.available_gib:.0f} free"
    yield "disk", f"{found.disk_gib:,.0f} GiB free"
    yield "hub", f"token in {found.token_in}" if found.token_in else "no token"
    yield from _cluster(found.slurm)


def _cluster(slurm: Slurm | None) -> Iterator[tuple[str, str]]:
    if slurm is None:
        yield "Slurm", "not installed here"
        return
    if slurm.fault is not None:
        yield "Slurm", slurm.fault
        return
    for partition in slurm.partitions:
        words = [f"{partition.name}{' (default)' if partition.default else ''}"]
        words.append(", ".join(partition.gpus) or "no GPUs")
        words.append(f"{partition.nodes} node{'s' if partition.nodes != 1 else ''}")
        words.append(f"{partition.limit} at most" if partition.limit else "no time limit")
        if not partition.up:
            words.append("down")
        if partition.accounts is not None:
            words.append(f"only for {', '.join(partition.accounts)}")
        yield "Slurm", "; ".join(words)
    if slurm.accounts:
        yield "accounts", ", ".join(slurm.accounts)


class MachineFacts(Static):
    """Shows what was found, or that it is being looked for."""

    DEFAULT_CSS = "MachineFacts { margin-bottom: 1; }"

    def show(self, found: Machine | None) -> None:
        """Draw another machine; None: not known yet."""
        if found is None:
            self.update(warning("Looking at the machine…"))
            return
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(ratio=1)
        before = ""
        for name, words in facts(found):
            table.add_row("" if name == before else name, printable(words))
            before = name
        self.update(table)


class Targets(OptionList):
    """Machines to plan for, a line each; Enter or space chooses."""

    DEFAULT_CSS = "Targets { height: auto; }"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("space", "select", "Choose", show=False)]

    class Chosen(Message):
        """Plan for this one."""

        def __init__(self, target: Target) -> None:
            super().__init__()
            self.target = target

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id, compact=True)
        self._targets: tuple[Target, ...] = ()

    def show(self, found: Machine | None, draft: Draft) -> None:
        """Draw the list, with the mark where the answers are."""
        before, self._targets = self._targets, targets(found)
        chosen = next((t for t in self._targets if t.is_in(draft)), None)
        prompts = [self._prompt(target, target is chosen) for target in self._targets]
        if before != self._targets:
            highlighted = self.highlighted
            self.clear_options()
            self.add_options([Option(prompt) for prompt in prompts])
            self.highlighted = highlighted or 0
            return
        for index, prompt in enumerate(prompts):
            if self.get_option_at_index(index).prompt != prompt:
                self.replace_option_prompt_at_index(index, prompt)

    def _prompt(self, target: Target, chosen: bool) -> Text:
        mark = "●" if chosen else "○"
        name = printable(target.name)
        return Text.assemble(f"{mark} ", (name, "bold"), (f"  {printable(target.meaning)}", "dim"))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Say which one."""
        event.stop()
        self.post_message(self.Chosen(self._targets[event.option_index]))
