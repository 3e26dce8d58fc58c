"""What the loop writes down at each step: metrics.jsonl, and a line or a bar for people."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ms4.manifest import write_text

METRICS = Path("results/metrics.jsonl")
LINE_EVERY_S = 5.0
"""Seconds between two plain lines where there is no terminal."""


def keep_until(step: int) -> None:
    """Drop the lines after `step`: they are of steps that a kill undid; also a line cut short."""
    if not METRICS.exists():
        return
    kept = []
    for line in METRICS.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record["step"] <= step:
            kept.append(line + "\n")
    write_text(METRICS, "".join(kept))


def memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: of the CUDA allocator, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


class Reporter:
    """Appends a line a step to metrics.jsonl and shows how far it is, on stderr."""

    def __init__(self, steps: int, done: int) -> None:
        METRICS.parent.mkdir(exist_ok=True)
        self._steps = steps
        self._file = METRICS.open("a", encoding="utf-8")
        self._said = 0.0
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("train", total=steps, completed=done, text="")

    def __enter__(self) -> Reporter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._file.close()

    def add(self, record: dict[str, Any]) -> None:
        """Write one step's record."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        text = f"loss {record['loss']:.4f}  {record['tokens_per_s']:.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], text=text)
        elif time.monotonic() - self._said >= LINE_EVERY_S or record["step"] == self._steps:
            self._said = time.monotonic()
            line = f"train: step {record['step']} of {self._steps}  {text}"
            print(line, file=sys.stderr, flush=True)
