"""How long the run takes, and how much energy: from published ceilings, or from what the project's
own training measured. Each figure says which."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ms4 import plan, throughput
from ms4.device import GIB, GPUS, Gpu, gpus_called
from ms4.errors import Ms4Error
from ms4.manifest import read_json
from ms4_wizard.answers import Answers
from ms4_wizard.costs import Cost

FILL = 0.97
"""Share of a packed sequence that best-fit packing fills, where nothing was packed yet."""
LINES = 200
"""Of the end of metrics.jsonl that are looked at."""


@dataclass(frozen=True)
class Size:
    """How much data there is to train on."""

    samples: int
    tokens: int
    longest: int
    """Tokens of the longest sample."""

    def bins(self, sequence_length: int) -> int:
        """Packed sequences of that length."""
        return max(1, math.ceil(self.tokens / (FILL * sequence_length)))


@dataclass(frozen=True)
class Speed:
    """What a run takes, as far as it is known."""

    tokens_per_s: float | None
    kind: Literal["estimate", "measured"]
    source: str
    """What the speed is from."""
    tokens_per_step: int
    """Padding included."""
    steps: int | None
    """None: the data was not looked at."""
    steps_kind: Literal["estimate", "given"]
    """Given: in the answers."""
    hours: float | None
    kwh: float | None
    """At the GPU's full power, without the host; None for a CPU."""


def gpu_of(found: Cost) -> Gpu | None:
    """The GPU of the table of ceilings that stands for the device: by its name, else the smallest
    that has the budget; None for a CPU, and where nobody knows."""
    if found.kind == "cpu":
        return None
    named = gpus_called(found.device)
    room = found.budget
    large = [gpu for gpu in reversed(GPUS) if room is not None and room <= gpu.gib * GIB]
    if named:
        return next((gpu for gpu in large if gpu in named), named[0])
    return large[0] if large else None


def speed(answers: Answers, found: Cost, data: Size | None, project: Path | None = None) -> Speed:
    """What the run takes in time and energy.

    Args:
        answers: the answers.
        found: their memory plan.
        data: how much data there is, if it was looked at.
        project: the project that was opened: what its training measured holds for these answers
            if its plan was of the same settings.
    """
    config = found.config
    batch = config.train.micro_batch * config.train.accumulation
    per_step = batch * config.data.sequence_length
    steps = config.train.steps
    if steps is None and data is not None:
        steps = plan.total_steps(config, data.bins(config.data.sequence_length))
    gpu = gpu_of(found)
    measured = None if project is None else _measured(answers, project)
    if measured is not None:
        rate: float | None = measured
        kind: Literal["estimate", "measured"] = "measured"
        source = "this project's training"
    else:
        rate, kind = None, "estimate"
        source = "a CPU's speed is not estimated" if found.kind == "cpu" else "which GPU?"
        if gpu is not None:
            rate = throughput.estimate(config, found.dims, gpu).tokens_per_s
            source = gpu.name
    hours = None if steps is None or rate is None else steps * per_step / rate / 3600
    kwh = None if hours is None or gpu is None else hours * gpu.watts / 1000
    counted: Literal["estimate", "given"] = "estimate" if config.train.steps is None else "given"
    return Speed(rate, kind, source, per_step, steps, counted, hours, kwh)


def _measured(answers: Answers, project: Path) -> float | None:
    """Tokens a second of the project's training, if it was of the same settings."""
    try:
        planned = read_json(project / "results/plan.json")
        if planned.get("config_hash") != answers.configuration().part_hash("plan"):
            return None
        lines = (project / "results/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except (Ms4Error, OSError, UnicodeDecodeError, AttributeError):
        return None
    rates = []
    for line in lines[-LINES:]:
        try:
            rate = json.loads(line)["tokens_per_s"]
        except (ValueError, KeyError, TypeError):
            continue  # a line that is being written
        if isinstance(rate, int | float) and rate > 0:
            rates.append(float(rate))
    return statistics.median(rates) if rates else None


def duration(hours: float) -> str:
    """Hours in the unit that a person would use."""
    if hours < 1 / 60:
        return "< 1 min"
    if hours < 2:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 100 else f"{hours / 24:.0f} days"
