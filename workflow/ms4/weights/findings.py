"""What verify finds, as its file has it, and as a table for a person."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text as Line

SCALES = ("plain", "yarn")
Verdict = Literal["holds", "other", "unpredicted", "skipped"]
"""The configured softmax scale holds; the other one is clearly better; the model does not predict
the text, so that no loss says anything; there is no tokenizer to take a loss with."""


@dataclass(frozen=True)
class Losses:
    """Nats per token of one text under both softmax scales."""

    text: str
    tokens: int
    """Of which the loss is the mean."""
    plain: float
    yarn: float
    difference: float
    """The other scale's loss less that of the base's own."""
    standard_error: float
    """Of that difference, from the differences of the single tokens."""
    exact: float | None = None
    """Loss of the source's exact BF16 weights under the base's own scale, where it was taken."""
    added: float | None = None
    """What the base's storage adds to it."""


@dataclass
class Findings:
    """What verify has to say; as JSON, the keys of its file."""

    directory: str
    experts: str
    """How the routed experts are stored."""
    softmax_scale: str
    """The one that the base was made for."""
    parameters: int
    tensors: int = 0
    """Of the base, as they are in its files."""
    hashed: int = 0
    """Files of the source that were compared with the hashes recorded when they came."""
    scanned: int = 0
    """Files of the source that were scanned."""
    recomputed: dict[str, float] = field(default_factory=dict)
    """Norm-wise error of the sampled parameters."""
    losses: Losses | None = None
    verdict: Verdict = "skipped"
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was left out, and what is odd without being a fault."""

    @property
    def other(self) -> str:
        """The softmax scale that the base was not made for."""
        return SCALES[1 - SCALES.index(self.softmax_scale)]


_VERDICTS: dict[Verdict, str] = {
    "holds": "`{own}` holds: `{other}` is not clearly better",
    "other": "`{other}` is clearly better than `{own}`, which the base was made for",
    "unpredicted": "none: the model does not predict this text",
    "skipped": "none: no loss was taken",
}


def _rows(found: Findings) -> Iterator[tuple[str, str]]:
    yield (
        "tensors",
        f"{found.tensors:,} ({found.parameters:,} parameters, experts in {found.experts})",
    )
    scanned = f"{found.scanned} files scanned" if found.scanned else "not scanned"
    yield "source", f"{scanned}, {found.hashed or 'none'} compared with their SHA-256"
    if found.recomputed:
        worst = max(found.recomputed.values())
        what = f"largest error {worst:.2%}" if worst else "all exact"
        yield "recomputed", f"{len(found.recomputed)} parameters from the source: {what}"
    if (losses := found.losses) is not None:
        for scale, loss in zip(SCALES, (losses.plain, losses.yarn), strict=True):
            mark = " (the base's)" if scale == found.softmax_scale else ""
            yield f"loss, {scale}{mark}", f"{loss:.4f} nats per token"
        yield (
            "difference",
            f"{losses.difference:+.4f} ± {losses.standard_error:.4f} on {losses.tokens} tokens of "
            f"{losses.text}",
        )
        if losses.exact is not None:
            yield (
                "loss, exact BF16",
                f"{losses.exact:.4f}: {found.experts} adds {losses.added:+.4f}",
            )
    verdict = _VERDICTS[found.verdict].format(own=found.softmax_scale, other=found.other)
    yield "softmax scale", verdict
    yield "faults", str(len(found.faults)) if found.faults else "none"


def print_findings(found: Findings) -> None:
    """The findings as a table on standard output."""
    console = Console()
    table = Table(
        title=f"Check of {found.directory}",
        show_header=False,
        box=None,
        title_justify="left",
        padding=(0, 2, 0, 0),
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    bad = {"faults": bool(found.faults), "softmax scale": found.verdict == "other"}
    for name, value in _rows(found):
        table.add_row(name, Line(value, style="bold red" if bad.get(name) else ""))
    console.print(table)
    for note in found.notes:
        style = "bold yellow" if note.startswith("warning: ") else ""
        console.print(Line(f"  - {note}", style=style), soft_wrap=True)
