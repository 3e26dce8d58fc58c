"""Histograms of plain characters, for a terminal or a pipe."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

_BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def bar(share: float) -> str:
    """A bar of at most 40 characters; whatever is not nothing can be seen."""
    eighths = max(round(share * _BAR * 8), 1 if share > 0 else 0)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (_EIGHTHS[rest] if rest else "")


def histogram(rows: list[tuple[str, int]]) -> list[str]:
    """Lines of label, bar and number."""
    if not rows:
        return []
    width = max(len(label) for label, _ in rows)
    largest = max(number for _, number in rows)
    return [
        f"  {label:>{width}}  {bar(number / largest if largest else 0)} {number:,}"
        for label, number in rows
    ]


def by_length(lengths: npt.NDArray[np.int64]) -> list[tuple[str, int]]:
    """How many lengths lie between powers of two, from the shortest to the longest."""
    if not len(lengths):
        return []
    exponents = np.frexp(lengths.astype(np.float64))[1] - 1  # floor of log2
    first, last = int(exponents.min()), int(exponents.max())
    counts = np.bincount(exponents - first, minlength=last - first + 1)
    return [
        (f"{1 << e:,} to {(2 << e) - 1:,}", int(number))
        for e, number in zip(range(first, last + 1), counts, strict=True)
    ]


def by_fill(filled: npt.NDArray[np.int64], capacity: int) -> list[tuple[str, int]]:
    """How many sequences are so full, from the emptiest to the fullest."""
    edges = np.array([0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0])
    shares = filled / capacity
    counts = np.histogram(shares, np.append(edges, 1.0 + 1e-9))[0]
    labels = [f"{low:.0%} to {high:.0%}" for low, high in itertools.pairwise(edges)]
    rows = [(label, int(n)) for label, n in zip([*labels, "full"], counts, strict=True)]
    filled_rows = [at for at, (_, number) in enumerate(rows) if number]
    return rows[filled_rows[0] : filled_rows[-1] + 1] if filled_rows else []
