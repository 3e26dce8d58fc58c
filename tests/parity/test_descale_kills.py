"""`ms4 descale` killed wherever it changes a file, and at random moments: the same base in the end.

The reference is a run that nothing disturbed. What was whole at the kill is not made again.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pytest

from tests.kill_points import (
    CHANGES,
    Conditions,
    Point,
    Running,
    content,
    ms4,
    named_after_syncs,
    read_trace,
    start,
)
from tests.small_source import write

from .conftest import settings

pytestmark = pytest.mark.slow

SYNC_BYTES = 1 << 14
"""So small that these small files are synced on the way too."""
AT_ONCE = 4
"""Processes that run beside each other, in directories of their own."""


@dataclass(frozen=True)
class Descale:
    """A conversion, its undisturbed end, and the calls that it takes."""

    where: Path
    arguments: tuple[str, ...]
    reference: dict[str, bytes]
    trace: list[list[str]]
    seconds: float

    @property
    def counts(self) -> Counter[str]:
        """How often each function that changes files is called."""
        return Counter(call for call, *_ in self.trace)

    def in_(self, directory: Path) -> Descale:
        """The same conversion in another directory, made if need be."""
        directory.mkdir(parents=True, exist_ok=True)
        return replace(self, where=directory)

    @property
    def base(self) -> Path:
        return self.where / "base"

    def start(self, point: Point | None = None) -> Running:
        conditions = Conditions(point=point, sync_bytes=SYNC_BYTES)
        return start(self.where, *self.arguments, conditions=conditions)

    def again(self) -> Callable[[], None]:
        """Start it once more, undisturbed. The answer waits for the end, compares, and sees that
        whole pieces stayed."""
        found = content(self.base) if self.base.exists() else {}
        right = {name for name, data in found.items() if self.reference.get(name) == data}
        pieces = {name for name in right if name.endswith(".safetensors")}
        whole = {
            self.base / name: (self.base / name).stat().st_ino
            for name in pieces
            if f".pieces/{name}.json" in right
        }
        assert len(pieces) <= len(whole) + 1  # a record follows each name
        running = self.start()

        def check() -> None:
            result = running.result()
            assert result.code == 0, result.text
            assert content(self.base) == self.reference
            assert {path: path.stat().st_ino for path in whole} == whole

        return check

    def ends_right(self) -> None:
        """Run it once more, undisturbed."""
        self.again()()

    def vouches_for_nothing_else(self) -> None:
        """A manifest stands only over what is whole and right."""
        if (self.base / "base.json").exists():
            named = {entry["path"] for entry in json.loads(self.reference["base.json"])["files"]}
            found = content(self.base)
            assert {name: found[name] for name in named} == {
                name: self.reference[name] for name in named
            }


def survive(descale: Descale, places: Iterable[tuple[Path, Point]], killed: bool = True) -> None:
    """Killed at a point in each place, it ends right with the next run.

    Args:
        descale: what is run.
        places: directories of their own and what happens in them.
        killed: whether it must come to each point; else it may end before.
    """
    remaining = iter(places)
    while some := list(islice(remaining, AT_ONCE)):
        here = [descale.in_(directory) for directory, _ in some]
        running = [one.start(point) for one, (_, point) in zip(here, some, strict=True)]
        for one, run in zip(here, running, strict=True):
            result = run.result()
            assert result.code == -signal.SIGKILL or (not killed and result.code == 0), result.text
            one.vouches_for_nothing_else()
        for check in [one.again() for one in here]:
            check()


def numbered(root: Path, points: Iterable[Point]) -> Iterator[tuple[Path, Point]]:
    """A directory for each point."""
    for number, point in enumerate(points):
        yield root / str(number), point


def undisturbed(directory: Path, source: Path, to: str) -> Descale:
    directory.mkdir()
    arguments = ("descale", str(source), "base", "--to", to)
    trace = directory / "trace"
    conditions = Conditions(trace=trace, sync_bytes=SYNC_BYTES)
    result = ms4(directory, *arguments, conditions=conditions)
    assert result.code == 0, result.text
    calls = read_trace(trace)
    made = Descale(directory, arguments, content(directory / "base"), calls, seconds=0)
    begun = time.monotonic()  # the first run waited for the parent, which imports torch
    made.in_(directory.with_name("again")).ends_right()
    return replace(made, seconds=time.monotonic() - begun)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {
        "hf": write(root / "hf", "hf"),
        "native": write(root / "native", "native"),
        "other": write(root / "other", "hf", seed=1),
    }


@pytest.fixture(scope="module")
def descale(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Descale:
    return undisturbed(tmp_path_factory.mktemp("plain") / "plain", sources["hf"], "nf4")


def all_points(descale: Descale) -> list[Point]:
    """Before and after every call but the writes; `fdatasync` is called when it is called."""
    return [
        Point(call, number, when)
        for call in CHANGES
        if call not in ("pwrite", "fdatasync")
        for number in range(1, descale.counts[call] + 1)
        for when in ("before", "after")
    ]


def test_the_undisturbed_run_syncs_what_it_names(descale: Descale) -> None:
    """Each file before it gets its name, the directory after it; and these are all the names."""
    assert set(descale.counts) == set(CHANGES) - {"rename"}
    named = named_after_syncs(descale.trace)
    assert {str(path.relative_to(descale.base)) for path in named} == set(descale.reference)


def test_killed_at_every_sync_rename_and_removal(descale: Descale, tmp_path: Path) -> None:
    points = all_points(descale)
    assert len(points) > 80
    survive(descale, numbered(tmp_path, points))


def within_writes(descale: Descale, step: int) -> list[Point]:
    """Half of a write is done."""
    return [Point("pwrite", n, "within") for n in range(1, descale.counts["pwrite"] + 1, step)]


def at_early_syncs(descale: Descale) -> list[Point]:
    """Syncs of files that still grow; when they come depends on which thread is faster."""
    numbers = range(1, descale.counts["fdatasync"] + 1)
    return [Point("fdatasync", n, when) for n in numbers for when in ("before", "after")]


def test_killed_within_writes(descale: Descale, tmp_path: Path) -> None:
    survive(descale, numbered(tmp_path / "writes", within_writes(descale, 12)))
    survive(descale, numbered(tmp_path / "syncs", at_early_syncs(descale)), killed=False)


def test_killed_again_and_again(descale: Descale, tmp_path: Path) -> None:
    """Each run of the same base gets one rename further than the one before."""
    here = descale.in_(tmp_path / "here")
    for _ in range(descale.counts["replace"] + 1):
        result = here.start(Point("replace", 2, "after")).result()
        here.vouches_for_nothing_else()
        if result.code == 0:
            break
        assert result.code == -signal.SIGKILL
    here.ends_right()


def killed_at_random(descale: Descale, root: Path, kills: int, seed: int) -> None:
    dice, number, killed = random.Random(seed), 0, 0
    for _ in range(kills):
        here = descale.in_(root / str(number))
        running = here.start()
        time.sleep(dice.uniform(0, 1.2 * descale.seconds))
        running.send(signal.SIGKILL)
        code = running.result().code
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        here.vouches_for_nothing_else()
        if code == 0 or dice.random() < 0.3:
            here.ends_right()
            number += 1
    descale.in_(root / str(number)).ends_right()
    assert killed > 0


def test_killed_at_random_moments(descale: Descale, tmp_path: Path) -> None:
    killed_at_random(descale, tmp_path, kills=10, seed=int(time.time()))


def test_killed_while_it_replaces_the_base_of_another_source(
    descale: Descale, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Names and sizes are the same: only a missing manifest tells a mixture of both."""
    new = undisturbed(tmp_path / "new", sources["other"], "nf4")
    assert new.reference.keys() == descale.reference.keys()
    for number in range(1, new.counts["replace"] + 1, 3):
        descale.in_(tmp_path / str(number)).ends_right()
        survive(new, [(tmp_path / str(number), Point("replace", number, "after"))])


def test_a_run_over_a_whole_base_makes_nothing(descale: Descale, tmp_path: Path) -> None:
    here = descale.in_(tmp_path / "here")
    here.ends_right()
    here.ends_right()


def test_a_project_survives_kills(checkpoint: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    """The stage of a project, killed at names of pieces and of records."""
    project = tmp_path / "project"
    (project / "config").mkdir(parents=True)
    values = settings(checkpoint).model_dump(mode="json")
    (project / "config/config.yaml").write_text(json.dumps(values))
    assert ms4(project, "fetch").code == 0
    for number in (1, 2, 5):
        conditions = Conditions(point=Point("replace", number, "after"))
        assert ms4(project, "descale", conditions=conditions).code == -signal.SIGKILL
        assert not (project / "weights/base.json").exists()
    result = ms4(project, "descale")
    assert result.code == 0, result.text
    assert content(project / "weights/base") == content(bases["nf4"] / "weights/base")
    manifests = [root / "weights/base.json" for root in (project, bases["nf4"])]
    assert manifests[0].read_bytes() == manifests[1].read_bytes()


# Long counts.


@pytest.mark.soak
@pytest.mark.parametrize(
    ("layout", "to"), [("hf", "nf4"), ("native", "bf16"), ("native", "fp8"), ("hf", "bf16")]
)
def test_killed_at_every_point(
    sources: dict[str, Path], tmp_path: Path, layout: str, to: str
) -> None:
    descale = undisturbed(tmp_path / "plain", sources[layout], to)
    survive(descale, numbered(tmp_path / "points", all_points(descale)))
    survive(descale, numbered(tmp_path / "writes", within_writes(descale, 1)))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_many_random_moments(descale: Descale, tmp_path: Path, seed: int) -> None:
    killed_at_random(descale, tmp_path, kills=250, seed=seed)
