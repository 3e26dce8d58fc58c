"""`ms4 fetch … --convert` in processes that die, and what the next run must make of it."""

from __future__ import annotations

import json
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tests import small_source
from tests.commands import wait_for
from tests.fetching import REPOSITORY, environment
from tests.hub import Hub
from tests.kill_points import CHANGES, Conditions, Point, Running, content, start


def weights(base: Path) -> dict[str, bytes]:
    """All files of a base but its records, locks and its manifest, which names its directory."""
    return {
        name: data
        for name, data in content(base).items()
        if not name.startswith(".pieces") and name != "base.json"
    }


def shards(directory: Path) -> list[str]:
    return [path.name for path in small_source.shards_of(directory)]


@dataclass
class Killed:
    """`ms4 fetch … --convert` in processes of their own, each in its own directory."""

    hub: Hub
    source: Path
    home: Path
    reference: dict[str, bytes]
    options: tuple[str, ...]

    def start(
        self,
        directory: Path,
        point: Point | None = None,
        trace: Path | None = None,
        **variables: str,
    ) -> Running:
        directory.mkdir(exist_ok=True, parents=True)
        given = environment(self.home, self.hub.url) | variables
        conditions = Conditions(point=point, trace=trace, environment=given)
        command = ("fetch", f"{REPOSITORY}-hf", "out", "--convert", "nf4", *self.options)
        return start(directory, *command, conditions=conditions)

    def ends_right(self, directory: Path) -> None:
        """The next run brings what is not here, from where it ended, and the base is the same."""
        out = directory / "out"
        before = {path.name: path.stat().st_size for path in out.glob("*") if path.is_file()}
        freed = recorded_as_freed(out)
        self.hub.requests.clear()
        result = self.start(directory).result()
        assert result.code == 0, result.text
        assert weights(out / "nf4") == self.reference
        left = shards(out)
        assert left == ([] if self.options else shards(self.source))
        for path in self.source.iterdir():
            parts = [size for name, size in before.items() if name.startswith(f"{path.name}.")]
            size = before.get(path.name, parts[0] if parts else 0)
            if path.name in freed or size == path.stat().st_size:
                assert self.hub.ranges(path.name) == [], path.name
            else:
                assert self.hub.ranges(path.name) == [f"bytes={size}-" if size else None]


def recorded_as_freed(out: Path) -> set[str]:
    record = out / ".fetched.json"
    if not record.exists():
        return set()
    files = json.loads(record.read_text())["files"]
    return {name for name, known in files.items() if known["pieces"]}


def survive_points(killed: Killed, tmp_path: Path, some: int | None) -> None:
    """Killed before and after each call that changes files, or at a few of them."""
    trace = tmp_path / "trace"
    killed.start(tmp_path / "whole", trace=trace).result()
    calls = [line.split("\t")[0] for line in trace.read_text().splitlines()]
    points = [
        Point(call, number, when)
        for call in CHANGES
        for number in range(1, calls.count(call) + 1)
        for when in ("before", "after")
    ]
    if some is not None:
        points = random.Random(len(killed.options)).sample(points, some)
    for number, point in enumerate(points):
        directory = tmp_path / str(number)
        result = killed.start(directory, point).result()
        # Threads take turns, and the last calls of one run may be one more in another.
        assert result.code in (0, -signal.SIGKILL), result.text
        killed.ends_right(directory)


def survive_moments(killed: Killed, tmp_path: Path, seed: int, times: int) -> None:
    """Killed at random moments, again and again."""
    dice = random.Random(seed)
    killed.hub.pace = sum(path.stat().st_size for path in killed.source.iterdir()) / 0.4
    for _ in range(times):
        killed.hub.requests.clear()
        running = killed.start(tmp_path / "moments")
        wait_for(lambda: killed.hub.requests, "a request")
        time.sleep(dice.uniform(0, 1.2))
        running.send(signal.SIGKILL)
        running.result()
    killed.hub.pace = None
    killed.ends_right(tmp_path / "moments")
