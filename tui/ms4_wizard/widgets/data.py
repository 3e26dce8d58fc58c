"""What the data holds, beside the question for it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from textual.widgets import Static

from ms4.data.format_names import NAMES
from ms4.errors import printable
from ms4.memory import size
from ms4_wizard.looking import Look


def progress(look: Look, width: int) -> Iterator[Text]:
    """How far the look is."""
    share = min(1.0, look.done / look.size) if look.size else 0.0
    filled = round(width * share)
    yield Text.assemble(("━" * filled, "bold"), ("━" * (width - filled), "dim"))
    yield Text(f"{share:.0%} of {size(look.size)}; Ctrl+X cancels", "dim")


def efforts(look: Look) -> Iterator[str]:
    """How the samples think, a line a kind."""
    for kind, counts in look.found.get("by_kind", {}).items():
        share = counts["samples"] / max(1, look.found["samples"])
        name = kind if kind == "plain text" else f"effort {kind}"
        yield f"{name}: {counts['samples']:,} ({share:.0%})"


def _count(number: int, noun: str) -> str:
    # Not that of ms4.data.render: it brings the tokenizer, which takes a second to import.
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class _Picture:
    def __init__(self, look: Look | None, unread: str, stops: bool) -> None:
        self._look, self._unread, self._stops = look, unread, stops

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        look, width = self._look, options.max_width
        if look is None:
            yield Text(self._unread, "dim")
            return
        if look.state == "reading":
            yield Text("Reading the data…")
            yield from progress(look, width)
        elif look.state == "cancelled":
            yield Text("Cancelled. Ctrl+X looks again.", "yellow")
        elif look.state == "failed":
            yield Text(printable(look.error), "red")
        if look.samples:
            number = len(look.samples)
            yield Text.assemble(("Ctrl+E", "bold reverse"), f" shows the first {number} samples")
        if look.found:
            yield from self._found(look, width)

    def _found(self, look: Look, width: int) -> Iterator[Text]:
        found = look.found
        for name, file in list(found["files"].items())[:3]:
            told = NAMES.get(file["format"], file["format"])
            short = printable(name)
            short = short if len(short) <= width else "…" + short[1 - width :]
            yield Text(short, "bold")
            yield Text(f"  {told}, {file['records']:,} records")
            if file["unused"]:
                yield Text(f"  not used: {printable(', '.join(file['unused']))}", "yellow")
        if len(found["files"]) > 3:
            yield Text(f"and {len(found['files']) - 3} more files", "dim")
        yield Text(f"{found['samples']:,} samples, {found['turns']:,} answers")
        tokens, trained = found["tokens"], found["trained_tokens"]
        yield Text(f"{tokens:,} tokens, {trained / max(1, tokens):.0%} trained")
        for line in efforts(look):
            yield Text(f"  {line}")
        if found["images"]:
            yield Text(f"{_count(found['images'], 'image')}: answer `text and images` at Modality")
        lengths = found["lengths"]
        yield Text(
            f"tokens a sample: half ≤ {lengths['median']:,}, longest {lengths['longest']:,}", "dim"
        )
        rows = found["histogram"]
        most = max((number for _, number in rows), default=1)
        for label, number in rows:
            room = max(1, width - 20 - len(f"{number:,}"))
            yield Text.assemble(
                f"{label.replace(' to ', '–'):>15} ",
                ("█" * max(1, room * number // most)),
                f" {number:,}",
            )
        faults = found["fault_count"]
        if faults:
            lost = f"{_count(found['dropped'], 'record')} lost"
            told = f"{lost} if they are left out" if self._stops else lost
            yield Text(f"{_count(faults, 'fault')}, {told}:", "bold red")
            shown = found["faults"][:5]
            for fault in shown:
                yield Text(printable(fault), "red")
            if faults > len(shown):
                yield Text("`ms4 data FILE` lists all of them.", "dim")
        else:
            yield Text("no faults", "green")


class DataPanel(Static):
    """Shows a look at the data."""

    def show(self, look: Look | None, unread: str, stops: bool) -> None:
        """Redraw.

        Args:
            look: what is known of the data; None: nothing yet.
            unread: what to say then.
            stops: the run stops at a faulty record.
        """
        self.update(_Picture(look, unread, stops))
