"""`results/metrics.jsonl` while it grows."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ms4_wizard.watch.follow import Follower

FILE = Path("results/metrics.jsonl")
CURVES = ("loss", "learning_rate", "tokens_per_s", "memory_gib", "seconds")
"""Numbers of a step that are kept."""
MOST = 1 << 30
"""Bytes of the file that are read at most: a run of a million steps."""


@dataclass
class Metrics:
    """What the training wrote of its steps so far."""

    steps: list[int] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CURVES})
    """By name, a number a step; NaN where the line has none."""
    expert_load: list[float] = field(default_factory=list)
    """Each expert's share of the rows in the latest step that says so."""

    def copy(self) -> Metrics:
        """The same, for another thread to look at."""
        curves = {name: list(values) for name, values in self.curves.items()}
        return Metrics(list(self.steps), curves, self.expert_load)

    def last(self, name: str) -> float | None:
        """The latest number of a curve; None if there is none."""
        values = self.curves[name]
        return values[-1] if values and math.isfinite(values[-1]) else None


class MetricsFile:
    """Reads what came since the last time. A file that was written anew is read anew: a training
    that goes on drops the steps that a kill undid."""

    def __init__(self, root: Path) -> None:
        self._follower = Follower(root / FILE, MOST)
        self._metrics = Metrics()

    def read(self) -> Metrics:
        """The metrics so far; lines that are no step's are passed over."""
        lines, anew = self._follower.read()
        if anew:
            self._metrics = Metrics()
        for line in lines:
            self._take(line)
        return self._metrics.copy()

    def _take(self, line: str) -> None:
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            return
        metrics = self._metrics
        while metrics.steps and metrics.steps[-1] >= record["step"]:
            metrics.steps.pop()  # done again
            for values in metrics.curves.values():
                values.pop()
        metrics.steps.append(record["step"])
        for name, values in metrics.curves.items():
            values.append(number(record.get(name)))
        load = record.get("expert_load")
        if isinstance(load, list) and load:
            shares = [number(share) for share in load]
            if all(math.isfinite(share) and share >= 0 for share in shares):
                metrics.expert_load = shares


def number(value: Any) -> float:
    """A JSON number as a float; NaN for anything else."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if plain else math.nan
    except OverflowError:
        return math.nan
