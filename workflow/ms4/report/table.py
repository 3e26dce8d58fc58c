"""The evaluation as a table: pairs of untuned and tuned, for the terminal, the report and the card.

Neither torch nor matplotlib here: `ms4 summary` prints it on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ms4.errors import Ms4Error
from ms4.manifest import read_manifest

EVALUATION = Path("results/evaluation.json")
REPORT = Path("results/report/report.html")

VERDICTS = {
    "pass": "pass: every required share of exact answers is reached",
    "fail": "fail",
    "none": "none: evaluate.min_exact_match requires nothing",
}


@dataclass(frozen=True)
class Scores:
    """What one model reached on one held-out set in one effort."""

    samples: int
    loss: float | None
    """Held-out loss, nats a token; None where there is nothing to take it of."""
    exact_match: float
    """Share of answers that are exactly right, 0 to 1."""
    well_formed: float
    """Share of answers in the form that the effort asks for, 0 to 1."""


@dataclass(frozen=True)
class Pair:
    """A held-out set in one effort, before and after the training."""

    set: str
    effort: str
    untuned: Scores | None
    tuned: Scores | None

    def both(self, field: str) -> tuple[float | None, float | None]:
        """A score of the untuned and of the tuned model."""
        return (
            None if self.untuned is None else getattr(self.untuned, field),
            None if self.tuned is None else getattr(self.tuned, field),
        )

    @property
    def samples(self) -> int:
        """Samples that were answered."""
        return max(scores.samples for scores in (self.untuned, self.tuned) if scores is not None)


def pair_rows(evaluation: Mapping[str, Any]) -> list[Pair]:
    """The rows of `results/evaluation.json`, untuned beside tuned, in their order."""
    found: dict[tuple[str, str], dict[str, Scores]] = {}
    for row in evaluation["rows"]:
        scores = Scores(row["samples"], row["loss"], row["exact_match"], row["well_formed"])
        found.setdefault((row["set"], row["effort"]), {})[row["model"]] = scores
    return [
        Pair(name, effort, models.get("untuned"), models.get("tuned"))
        for (name, effort), models in found.items()
    ]


def percent(share: float | None) -> str:
    """A share as a percentage; a dash for none."""
    return "–" if share is None else f"{100 * share:.1f} %"


def nats(loss: float | None) -> str:
    """A loss; a dash for none."""
    return "–" if loss is None else f"{loss:.3f}"


def change(pair: Pair, field: str) -> str:
    """`before → after` of one score."""
    form = nats if field == "loss" else percent
    before, after = pair.both(field)
    return f"{form(before)} → {form(after)}"


def print_summary(root: Path) -> None:
    """Print the evaluation of the project at `root` and where its report is.

    Raises:
        Ms4Error: the project has not been evaluated yet.
    """
    path = root / EVALUATION
    if not path.exists():
        raise Ms4Error(f"{path} is missing: run `snakemake --profile local` first.")
    evaluation = read_manifest(path, "evaluate")
    console = Console()
    table = Table(
        title="Held-out sets, untuned → tuned model",
        box=None,  # lines between the columns would not leave 80 characters room for the scores
        title_justify="left",
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    table.add_column("set", overflow="fold", min_width=4)
    table.add_column("effort", no_wrap=True)
    for name in ("samples", "loss", "exact match", "well formed"):
        table.add_column(name, justify="right", no_wrap=True)
    for pair in pair_rows(evaluation):
        scores = [Text(change(pair, field)) for field in ("loss", "exact_match", "well_formed")]
        if pair.untuned and pair.tuned and pair.tuned.exact_match > pair.untuned.exact_match:
            scores[1].stylize("green")
        table.add_row(Text(pair.set), Text(pair.effort), str(pair.samples), *scores)
    console.print(table)
    verdict = evaluation["verdict"]
    style = {"pass": "bold green", "fail": "bold red"}.get(verdict, "")
    console.print(Text("Verdict: ").append(VERDICTS.get(verdict, str(verdict)), style))
    for failure in evaluation["failures"]:
        console.print(Text(f"  - {failure}"))
    report = root / REPORT
    if report.exists():
        # Unwrapped: a path that is broken over two lines cannot be copied.
        console.print(Text(f"Report: {report}"), soft_wrap=True)
