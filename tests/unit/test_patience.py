"""A hub that sends, but next to nothing: how long that is borne, and what is done then."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ms4.errors import Ms4Error
from ms4.weights import patience
from ms4.weights.download import RemoteFile, Repository
from ms4.weights.meter import Meter
from ms4.weights.patience import Gate, Pace, Passing, Patience
from tests.fetching import BIG, REPOSITORY, make_checkpoint
from tests.hub import Fault, Hub, serve


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and a patience of a moment with what it sends."""
    monkeypatch.setattr(patience, "TRICKLE_S", 0.3)
    monkeypatch.setattr(patience, "PAUSES_S", (0.01, 0.01, 0.01))
    with serve({REPOSITORY: make_checkpoint(tmp_path / "checkpoint")}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def fetch(name: str, directory: Path) -> RemoteFile:
    directory.mkdir(exist_ok=True)
    repository = Repository(REPOSITORY)
    snapshot = repository.snapshot(None)
    file = snapshot.file(name)
    with Meter("fetched", file.size) as meter:
        repository.fetch(file, snapshot.commit, directory, meter, threading.Event())
    return file


def test_a_trickle_is_asked_again(server: Hub, tmp_path: Path) -> None:
    """From where the file ended: what trickled in is kept."""
    server.faults.append(Fault(f"*/{BIG}", times=1, trickle_after=100_000))
    fetch(BIG, tmp_path / "here")
    first, again = server.ranges(BIG)
    assert first is None
    assert again is not None
    assert 100_000 < int(again.removeprefix("bytes=").removesuffix("-")) < 101_000
    ours, theirs = tmp_path / "here" / BIG, tmp_path / "checkpoint" / BIG
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_trickle_that_lasts_is_an_error(server: Hub, tmp_path: Path) -> None:
    server.faults.append(Fault(f"*/{BIG}", trickle_after=0))
    with pytest.raises(
        Ms4Error, match=rf"stalled: \d+ bytes of {BIG} in 0 s \(4 tries\)"
    ) as caught:
        fetch(BIG, tmp_path / "here")
    assert "the same command goes on from there" in str(caught.value)
    (part,) = (tmp_path / "here").glob("*.part")
    kept = part.stat().st_size
    assert 0 < kept < 1000
    server.faults.clear()
    fetch(BIG, tmp_path / "here")
    assert server.ranges(BIG)[-1] == f"bytes={kept}-"


@pytest.mark.slow
def test_a_slow_line_is_no_trickle(server: Hub, tmp_path: Path) -> None:
    server.pace = 20_000
    fetch("tekken.json", tmp_path / "here")
    assert server.ranges("tekken.json") == [None]


class Clock:
    """Stands until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(patience.time, "monotonic", lambda: self.now)


def test_the_floor_is_a_kilobyte_a_second_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pace = Clock(monkeypatch), Pace("a hub", "a file")
    for _ in range(40):  # ten minutes just above the floor
        clock.now += 15
        pace.add(15_100)
    for _ in range(3):
        clock.now += 15
        pace.add(14_900)
    clock.now += 15
    with pytest.raises(Passing, match="a hub stalled: 59600 bytes of a file in 60 s"):
        pace.add(14_900)


def test_the_minute_of_a_trickle_tries_no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the tries may take one."""
    clock = Clock(monkeypatch)
    waits = Patience(Gate(), threading.Event())
    monkeypatch.setattr(patience, "PAUSES_S", (0.0, 0.0, 0.0))
    for _ in range(3):
        clock.now += 60
        waits.wait(Passing("a hub stalled", lasted_s=60))
    clock.now += 60
    with pytest.raises(Ms4Error, match=r"a hub stalled \(4 tries\)"):
        waits.wait(Passing("a hub stalled", lasted_s=60))
