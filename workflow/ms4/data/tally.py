"""What a data set holds, counted while it is read."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ms4.config_data import EFFORTS
from ms4.data.prepare import Outcome, Sample

KINDS = ("plain text", "none", "none, with thinking", "high", "high, without thinking")
"""Kinds of samples: their effort, and whether they think as it says."""


@dataclass
class Tally:
    """Counts of the training records."""

    records: int = 0
    samples: int = 0
    dropped: int = 0
    too_long: int = 0
    truncated: int = 0
    turns: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    images: int = 0
    image_tokens: int = 0
    image_tokens_uncapped: int = 0
    """What the images would take without `data.images.max_size`."""
    longest_tokens: int = 0
    """Of the longest sample that was too long."""
    longest_place: str = ""
    by_effort: dict[str, Counter[str]] = field(
        default_factory=lambda: {effort: Counter() for effort in EFFORTS}
    )
    by_kind: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    notes: Counter[str] = field(default_factory=Counter)
    """What policies let pass or mended: `missing fix`."""
    changed: Counter[str] = field(default_factory=Counter)
    """What mistral-common's rules changed in the texts."""
    lengths: array[int] = field(default_factory=lambda: array("q"))
    """Tokens of each sample."""

    def refuse(self, outcome: Outcome, place: str) -> None:
        """Count a row that gave no sample."""
        self.records += outcome.records
        self.dropped += outcome.records
        if outcome.too_long:
            self.too_long += 1
            if outcome.too_long > self.longest_tokens:
                self.longest_tokens, self.longest_place = outcome.too_long, place

    def take(self, sample: Sample) -> None:
        """Count a sample."""
        tokens, trained = len(sample.encoded.tokens), sample.trained_tokens
        self.records += 1
        self.samples += 1
        self.truncated += sample.truncated
        self.turns += sample.turns
        self.tokens += tokens
        self.trained_tokens += trained
        for image in sample.encoded.images:
            self.images += 1
            self.image_tokens += image.tokens
            self.image_tokens_uncapped += image.tokens_uncapped
        # Most samples have neither, and a counter's update is slow.
        if sample.notes:
            self.notes.update(sample.notes)
        if sample.encoded.changed:
            self.changed.update(sample.encoded.changed)
        self.lengths.append(tokens)
        kind = _kind(sample)
        for count in (self.by_effort[sample.effort], self.by_kind[kind]):
            count["samples"] += 1
            count["tokens"] += tokens
            count["trained_tokens"] += trained

    @property
    def sample_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sample."""
        return np.frombuffer(self.lengths, dtype=np.int64).copy()

    def image_counts(self) -> dict[str, int]:
        """Tokens of the images, breaks included."""
        return {
            "image_tokens": self.image_tokens,
            "image_tokens_uncapped": self.image_tokens_uncapped,
        }

    def counts(self) -> dict[str, Any]:
        """What manifests and reports say of it."""
        names = ("samples", "tokens", "trained_tokens")
        return {
            "records": self.records,
            "samples": self.samples,
            "dropped": self.dropped,
            "too_long": self.too_long,
            "truncated": self.truncated,
            "turns": self.turns,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "by_effort": {e: {n: c[n] for n in names} for e, c in self.by_effort.items()},
            "by_kind": {
                kind: {name: self.by_kind[kind][name] for name in names}
                for kind in KINDS
                if kind in self.by_kind
            },
            "thinking": dict(sorted(self.notes.items())),
            "changed": dict(sorted(self.changed.items())),
        }


def _kind(sample: Sample) -> str:
    if sample.plain:
        return "plain text"
    if sample.effort == "none":
        return "none, with thinking" if sample.thinks else "none"
    return "high" if sample.thinks else "high, without thinking"
