"""The run screen: on files by hand, with snapshots, and over a real run of the tiny model."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from textual.pilot import Pilot
from textual.widgets import RichLog

from ms4 import lock
from ms4.config import STAGES
from ms4_wizard.screens.run import RunScreen, StopScreen
from ms4_wizard.watch.app import WatchApp
from ms4_wizard.watch.snakemake_log import Logs
from ms4_wizard.watch.stages import LAUNCHED
from ms4_wizard.widgets.stages import StageList
from tests.commands import CHECKOUT, wait_for
from tests.projects import write_project
from tests.tui import runs

pytestmark = pytest.mark.slow

SIZES = ((80, 24), (140, 45))
Drive = Callable[[Pilot[Any]], Awaitable[None]]


def drive(app: WatchApp, how: Drive, size: tuple[int, int] = (80, 24)) -> list[str] | None:
    async def run() -> list[str] | None:
        async with app.run_test(size=size) as pilot:
            await until(pilot, lambda: app.run_screen.seen is not None, "the first look")
            await pilot.pause()
            await how(pilot)
        return app.return_value

    return asyncio.run(run())


async def until(
    pilot: Pilot[Any], condition: Callable[[], object], what: str, seconds: float = 240
) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited for {what}; it shows:\n{drawn(pilot)}"
        await pilot.pause(0.1)


def drawn(pilot: Pilot[Any]) -> str:
    """The screen as lines of text."""
    return "\n".join(strip.text for strip in pilot.app.screen._compositor.render_strips())


def says(pilot: Pilot[Any]) -> str:
    return drawn(pilot).splitlines()[0].split("  ")[-1].strip()


# On files by hand.


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_everything_is_in_sight(tmp_path: Path, size: tuple[int, int]) -> None:
    started = runs.training(tmp_path / "project")
    app = WatchApp(tmp_path / "project", "local", now=lambda: started + 75)

    async def how(pilot: Pilot[Any]) -> None:
        text = drawn(pilot)
        for part in (
            *STAGES,
            *("2:05", "1:15", "training: step 240 of 400 (60%), 24:", "left", "loss 1.1"),
            *("learning rate 5.2e-5", "tokens/s 1,8", "memory 61.9 GiB  planned 62.4"),
            *("0.4 to 1.6 × an even share", "train: step 240 of 400", "logs/train.log"),
            *("Run", "Stop", "Leave"),
        ):
            assert part in text, f"{part!r} is not in sight:\n{text}"

    drive(app, how, size)


def test_another_log_is_picked_and_followed_again(tmp_path: Path) -> None:
    runs.training(tmp_path)
    runs.put(tmp_path, "logs/fetch.log", "fetched\x1b[2J it\n")
    runs.put(tmp_path, str(LAUNCHED), "LockException: somebody else\n")

    async def how(pilot: Pilot[Any]) -> None:
        await pilot.press("home")
        await until(pilot, lambda: "logs/fetch.log" in drawn(pilot), "another log", 20)
        assert "fetched\\x1b[2J it" in drawn(pilot), "a log is no command for the terminal"
        # It stays there, whatever runs.
        await pilot.pause(1.3)
        assert "logs/fetch.log" in drawn(pilot)
        await pilot.press("down")
        await until(pilot, lambda: "Nothing is written there yet." in drawn(pilot), "no log", 20)
        runs.put(tmp_path, "logs/descale.log", "layer 1\n")
        await until(pilot, lambda: "layer 1" in drawn(pilot), "what came", 20)
        assert "Nothing is written" not in drawn(pilot)
        await pilot.press("end")
        await until(pilot, lambda: "LockException: somebody" in drawn(pilot), "Snakemake's", 20)
        await pilot.press("f")
        await until(pilot, lambda: "logs/train.log" in drawn(pilot), "the training's", 20)
        await pilot.press("l")
        await until(pilot, lambda: "▶ train" not in drawn(pilot), "the log alone", 20)
        await pilot.press("l")
        await until(pilot, lambda: "▶ train" in drawn(pilot), "all of it", 20)

    drive(WatchApp(tmp_path, "local"), how)


def test_a_terminal_that_is_made_small_and_large(tmp_path: Path) -> None:
    runs.training(tmp_path)

    async def how(pilot: Pilot[Any]) -> None:
        for size in ((30, 8), (200, 60), (10, 3), (80, 24)):
            await pilot.resize_terminal(*size)
            await pilot.pause(0.2)
        assert "▶ train" in drawn(pilot)

    drive(WatchApp(tmp_path, "local"), how, (140, 45))


def test_what_cannot_be_done_is_not_done(tmp_path: Path) -> None:
    """Nothing runs, so there is nothing to stop; this process looks like a stage, so no run."""

    async def how(pilot: Pilot[Any]) -> None:
        await pilot.press("s")
        await pilot.pause()
        assert isinstance(pilot.app.screen, RunScreen)

    told = drive(WatchApp(runs.project(tmp_path / "idle"), "local"), how)
    assert told is None

    async def running(pilot: Pilot[Any]) -> None:
        await pilot.press("r")
        await pilot.pause()
        assert not (tmp_path / "busy" / LAUNCHED).exists()
        await pilot.press("s")
        await pilot.pause()
        assert isinstance(pilot.app.screen, StopScreen)
        await pilot.press("escape")
        await pilot.pause()
        assert isinstance(pilot.app.screen, RunScreen)
        await pilot.press("q")

    runs.training(tmp_path / "busy")
    told = drive(WatchApp(tmp_path / "busy", "local"), running)
    assert told == [f"The run in {tmp_path / 'busy'}: Snakemake is gone, its job runs on."]


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    """The Snakefile is empty: Snakemake itself refuses."""
    runs.project(tmp_path)

    async def how(pilot: Pilot[Any]) -> None:
        await pilot.press("r")
        await until(pilot, lambda: (tmp_path / LAUNCHED).is_file(), "a start")
        await pilot.press("end")
        await until(pilot, lambda: "Error" in drawn(pilot), "what Snakemake says")
        await until(pilot, lambda: says(pilot) == "not started", "its end")

    drive(WatchApp(tmp_path, "nowhere"), how)


# Snapshots: `pytest tests/tui/test_run_screen.py --snapshot-update` after a change that is meant.


def not_started(root: Path) -> float:
    runs.project(root)
    return 0


def failed(root: Path) -> float:
    runs.project(root)
    runs.done(root, "fetch", "descale")
    host = os.uname().nodename
    parts = [*runs.until("verify"), runs.begun("verify", 150), runs.failed("verify", 171)]
    runs.put_log(root, runs.log(*parts, host=host))
    runs.put(root, "logs/verify.log", "ms4 verify: 2 faults\n  model.norm.weight: is missing\n")
    return 0


def all_done(root: Path) -> float:
    runs.training(root)
    runs.done(root, *STAGES)
    (root / "locks/train.owner").unlink()
    parts = [*runs.until("deliver"), runs.begun("deliver", 4000), runs.finished("deliver", 4003)]
    runs.put_log(root, runs.log(*parts, "Complete log(s): /x\n"))
    runs.put(root, "results/metrics.jsonl", runs.metrics(400))
    runs.put(root, "logs/deliver.log", "Verdict: pass\nReport: results/report/report.html\n")
    return 0


STATES = {"idle": not_started, "training": runs.training, "failed": failed, "done": all_done}


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("state", STATES)
def test_snapshot(tmp_path: Path, snap_compare: Any, state: str, size: tuple[int, int]) -> None:
    started = STATES[state](tmp_path / "project")
    app = WatchApp(tmp_path / "project", "local", now=lambda: started + 75)

    async def before(pilot: Pilot[Any]) -> None:
        await until(pilot, lambda: app.run_screen.seen is not None, "the first look")
        await pilot.pause(0.3)

    assert snap_compare(app, terminal_size=size, run_before=before)


# A real run.


@pytest.fixture
def tiny(checkpoint: Path, tmp_path: Path, demo_values: dict[str, Any]) -> Iterator[Path]:
    """A project over the demo's data that trains for some seconds; it ends with its test."""
    values = demo_values
    values["model"]["source"] = str(checkpoint)
    values["train"] |= {"steps": 150, "checkpoint_every": 1000, "micro_batch": 2}
    values["evaluate"] |= {"max_samples": 2, "max_new_tokens": 4, "min_exact_match": {}}
    values["run"]["threads"] = 1
    root = write_project(tmp_path / "tiny", values)
    shutil.copytree(CHECKOUT / "examples/seal", root / "examples/seal")
    train = root / "examples/seal/train.jsonl"
    train.write_text("".join(train.read_text().splitlines(keepends=True)[:200]))
    yield root
    for process in runs.processes_in(root):
        process.kill()


def test_start_stop_go_on_leave_and_come_back(tiny: Path) -> None:
    left: list[int] = []

    async def how(pilot: Pilot[Any]) -> None:
        screen: RunScreen = pilot.app.run_screen  # type: ignore[attr-defined]

        def seen() -> Any:
            return screen.seen

        def training() -> bool:
            return any(s.name == "train" and s.state == "running" for s in seen().stages)

        await pilot.press("r")
        await until(pilot, lambda: training() and len(seen().metrics.steps) >= 3, "three steps")
        assert [stage.state for stage in seen().stages] == ["done"] * 5 + ["running"] + [
            "waiting",
            "waiting",
        ]
        await until(pilot, lambda: "of 150 (" in drawn(pilot), "the progress")
        text = drawn(pilot)
        for part in ("▶ train", "loss ", "logs/train.log", "× an even share", " left", "planned"):
            assert part in text, f"{part!r} is not in sight:\n{text}"
        assert seen().runner is not None
        assert says(pilot) == "running"

        await pilot.press("s")
        await pilot.pause()
        await pilot.press("y")
        await until(pilot, lambda: not seen().alive and says(pilot) == "stopped", "the stop")
        assert runs.processes_in(tiny) == []
        assert "a checkpoint is saved" in (tiny / "logs/train.log").read_text()
        (checkpoint,) = (tiny / "checkpoints").glob("step-*")
        at = int(checkpoint.name.removeprefix("step-"))
        assert seen().metrics.steps == list(range(1, at + 1))
        assert seen().stages[5].state == "stopped"

        await pilot.press("r")
        await until(pilot, lambda: training() and seen().metrics.steps[-1] > at, "more steps")
        goes_on = f"goes on from the checkpoint of step {at}"
        assert goes_on in (tiny / "logs/train.log").read_text()
        left.append(seen().runner)
        await pilot.press("q")

    told = drive(WatchApp(tiny, "local"), how)
    (runner,) = left
    assert told == [
        f"The run in {tiny}: running.",
        f"It goes on (Snakemake is process {runner}). To look at it again:",
        f"  ms4-wizard watch {tiny}",
    ]
    # It has a session of its own: no terminal's end ends it.
    assert psutil.Process(runner).is_running()
    assert os.getsid(runner) == runner != os.getsid(0)
    assert [owner.stage for owner in lock.live_owners(tiny)] == ["train"]

    async def again(pilot: Pilot[Any]) -> None:
        screen: RunScreen = pilot.app.run_screen  # type: ignore[attr-defined]
        await until(pilot, lambda: screen.seen.runner == runner, "the run that was left")  # type: ignore[union-attr]
        await until(pilot, lambda: says(pilot) == "finished", "the end")
        assert "training: step 150 of 150 (100%)" in drawn(pilot)
        assert all(stage.seconds is not None for stage in screen.seen.stages)  # type: ignore[union-attr]

    drive(WatchApp(tiny, "local"), again, (140, 45))
    wait_for(lambda: runs.processes_in(tiny) == [], "the end of Snakemake")
    lines = [json.loads(x) for x in (tiny / "results/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 151))
    assert len(Logs(tiny).sessions()) == 2
    assert all(session.ended for session in Logs(tiny).sessions())
    damaged(tiny)


def damaged(root: Path) -> None:
    """Each file of the finished run cut in its middle, and then all of them gone."""
    files = [
        *(root / "results").glob("*.json*"),
        *(root / "logs").glob("*.log"),
        *(root / ".snakemake/log").glob("*.log"),
    ]
    assert len(files) > 15

    async def nothing(pilot: Pilot[Any]) -> None:
        assert pilot.app.query(StageList) is not None
        assert "fetch" in drawn(pilot)
        assert pilot.app.screen.query_one("#log", RichLog).lines

    for change in (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), Path.unlink):
        for path in files:
            change(path)
        drive(WatchApp(root, "local"), nothing)
