"""The report's figures. They hold no date, so that the same run draws the same bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ms4.manifest import commit_file
from ms4.report.table import Pair

FAINT, LINE, GREY, ORANGE, INK = "#f5b88a", "#d9480f", "#adb5bd", "#f76707", "#343a40"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.edgecolor": "#868e96",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "ms4",  # element ids of an SVG are random otherwise
}


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving mean over at most `window` values; at the ends over those that there are."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    index = np.arange(len(values))
    low = np.maximum(index - window // 2, 0)
    high = np.minimum(index + window // 2 + 1, len(values))
    return [float(mean) for mean in (sums[high] - sums[low]) / (high - low)]


def _axes(figure: Figure, rows: int, heights: Sequence[float]) -> list[Axes]:
    grid = figure.add_gridspec(rows, 1, height_ratios=heights)
    first = figure.add_subplot(grid[0])
    axes = [first, *(figure.add_subplot(grid[n], sharex=first) for n in range(1, rows))]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e9ecef", linewidth=0.8)
        axis.set_axisbelow(True)
    return axes


def _save(figure: Figure, stem: Path, suffixes: Sequence[str]) -> list[Path]:
    FigureCanvasAgg(figure)
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix in suffixes:
        image = io.BytesIO()
        figure.savefig(
            image,
            format=suffix,
            dpi=150,
            facecolor="white",
            metadata={"Date": None} if suffix == "svg" else {},
        )
        path = stem.with_suffix(f".{suffix}")
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(image.getvalue())
        commit_file(temporary, path)
        written.append(path)
    return written


def draw_loss(metrics: Sequence[Mapping[str, Any]], stem: Path) -> list[Path]:
    """Loss (nats a trained token) and learning rate over the optimizer steps: PNG and SVG."""
    steps = [int(line["step"]) for line in metrics]
    losses = [float(line["loss"]) for line in metrics]
    window = max(1, len(steps) // 20)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8, 5), layout="constrained")
        top, bottom = _axes(figure, 2, (3, 1))
        marker = "o" if len(steps) < 3 else ""
        if window > 2:
            top.plot(steps, losses, color=FAINT, linewidth=0.9, label="each step")
            label = f"mean of {window // 2 * 2 + 1} steps"
            top.plot(steps, smooth(losses, window), color=LINE, linewidth=2, label=label)
            top.legend(frameon=False)
        else:
            top.plot(steps, losses, color=LINE, linewidth=1.6, marker=marker)
        top.set_ylabel("loss (nats per trained token)")
        top.set_ylim(bottom=min(0.0, *losses))
        top.tick_params(labelbottom=False)
        rates = [float(line["learning_rate"]) for line in metrics]
        bottom.plot(steps, rates, color=INK, linewidth=1.4, marker=marker)
        bottom.set_ylabel("learning rate")
        bottom.set_ylim(bottom=0)
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        bottom.set_xlabel("optimizer step")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _save(figure, stem, ("png", "svg"))


def draw_evaluation(pairs: Sequence[Pair], required: Mapping[str, float], stem: Path) -> list[Path]:
    """Exact answers (%) of the untuned and the tuned model by held-out set and effort: PNG.

    Args:
        pairs: the evaluation's rows.
        required: held-out set → share that the tuned model must reach, 0 to 1.
        stem: the file without its suffix.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(4.5, 1.8 + 1.3 * len(pairs)), 4), layout="constrained")
        (axis,) = _axes(figure, 1, (1,))
        width = 0.38
        for offset, color, name in ((-width / 2, GREY, "untuned"), (width / 2, ORANGE, "tuned")):
            scores = [pair.both("exact_match")[name == "tuned"] for pair in pairs]
            places = [n + offset for n, score in enumerate(scores) if score is not None]
            known = [score for score in scores if score is not None]
            bars = axis.bar(places, known, width * 0.94, color=color, label=name)
            axis.bar_label(bars, [f"{100 * score:.0f}" for score in known], padding=2, fontsize=9)
        lines = [(n, required[pair.set]) for n, pair in enumerate(pairs) if pair.set in required]
        if lines:
            axis.hlines(
                [share for _, share in lines],
                [n - 0.45 for n, _ in lines],
                [n + 0.45 for n, _ in lines],
                colors=INK,
                linestyles="dashed",
                linewidth=1.2,
                label="required",
            )
        axis.set_xticks(range(len(pairs)), [f"{pair.set}\n{pair.effort}" for pair in pairs])
        axis.set_xlim(-0.6, max(len(pairs), 1) - 0.4)
        axis.set_xlabel("held-out set and reasoning effort")
        axis.set_ylabel("exact answers (%)")
        axis.set_ylim(0, 1.08)
        axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
        return _save(figure, stem, ("png",))
