"""The first screen, and completing paths."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from textual.pilot import Pilot
from textual.widgets import Input

from ms4_wizard import demo, project, writing
from ms4_wizard.answers import Answers
from ms4_wizard.paths import candidates, complete
from ms4_wizard.screens.help import HelpScreen
from ms4_wizard.screens.review import ReviewScreen
from ms4_wizard.screens.step import StepScreen
from ms4_wizard.screens.welcome import WelcomeScreen
from tests.commands import CHECKOUT
from tests.tui.driving import VALUES, app_of, drive, screen_text, shown, until

pytestmark = pytest.mark.slow


def test_new_project(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        assert "New project" in screen_text(pilot)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(pilot.app.screen, StepScreen))

    drive(app_of({}, welcome=True), how)


def test_open_a_project_by_a_completed_path(place: Path, answers: Answers) -> None:
    writing.write_from_answers(answers, Path("some-project"))

    async def how(pilot: Pilot[list[str]]) -> None:
        await pilot.press("down", "enter")
        line = pilot.app.screen.query_one("#path", Input)
        await until(pilot, lambda: line.has_focus)
        await pilot.press(*"nowhere", "enter")
        await until(pilot, lambda: "holds no ms4 project" in shown(pilot))
        await pilot.press("ctrl+u", *"some", "tab")
        await until(pilot, lambda: line.value == "some-project/")
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(pilot.app.screen, ReviewScreen))
        flow = pilot.app.flow  # type: ignore[attr-defined]
        assert flow.draft.get("where.account") == "007"
        assert flow.opened == place / "some-project"

    drive(app_of({}, welcome=True), how)


def test_answers_from_a_file(place: Path) -> None:
    (place / "mine.yaml").write_text("data: {train: [train.jsonl]}\nseed: 5\n")
    (place / "wrong.yaml").write_text("seed: 5\nadapters: {rank: x}\n")

    async def how(pilot: Pilot[list[str]]) -> None:
        await pilot.press("down", "down", "enter")
        await pilot.press(*"wrong.yaml", "enter")
        await until(pilot, lambda: "data.train: is missing" in shown(pilot))
        assert "adapters.rank" in shown(pilot)
        await pilot.press("ctrl+u", *"mine.yaml", "enter")
        await until(pilot, lambda: isinstance(pilot.app.screen, ReviewScreen))
        assert pilot.app.flow.draft.get("seed") == 5  # type: ignore[attr-defined]

    drive(app_of({}, welcome=True), how)


def test_demo(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await pilot.press("down", "down", "down", "enter")
        await until(pilot, lambda: isinstance(pilot.app.screen, ReviewScreen))
        await pilot.press("ctrl+s")
        await until(pilot, lambda: (place / "ms4-demo/Snakefile").is_file())

    drive(app_of({}, welcome=True), how, (140, 45))
    for name in ("train", "seal", "chat", "copy"):
        made = (place / f"ms4-demo-data/{name}.jsonl").read_bytes()
        assert made == (CHECKOUT / f"examples/seal/{name}.jsonl").read_bytes()
    read = project.read_project(place / "ms4-demo")
    example = yaml.safe_load((CHECKOUT / "examples/answers.yaml").read_text())
    wanted = Answers.model_validate(example)
    assert read.model_copy(update={"data": wanted.data}) == wanted
    assert read == Answers.model_validate(demo.answers())


@pytest.mark.parametrize(
    ("typed", "found", "completed"),
    [
        ("tr", ["train.jsonl"], "train.jsonl"),
        ("sets", ["sets/"], "sets/"),
        ("sets/", ["sets/test.jsonl"], "sets/test.jsonl"),
        ("", ["train.jsonl", "sets/"], ""),
        ("nowhere/", [], "nowhere/"),
        ("train.jsonl/", [], "train.jsonl/"),
        ("x\0", [], "x\0"),
    ],
)
def test_completion(place: Path, typed: str, found: list[str], completed: str) -> None:
    assert candidates(typed, place) == found
    assert complete(typed, place) == completed


def test_completion_goes_as_far_as_all_agree(place: Path) -> None:
    for name in ("data-1.jsonl", "data-2.jsonl", ".hidden", "bell\x07"):
        (place / name).touch()
    assert complete("d", place) == "data-"
    assert candidates(".h", place) == [".hidden"]
    assert not any("hidden" in path or "\x07" in path for path in candidates("", place))
    (place / "absolute").mkdir()
    assert complete(f"{place}/abs", place) == f"{place}/absolute/"


def test_every_key_that_is_named_does_something(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        for key in ("question_mark", "f1"):
            await pilot.press(key)
            await until(pilot, lambda: isinstance(pilot.app.screen, HelpScreen))
            await pilot.press("escape")
            await until(pilot, lambda: isinstance(pilot.app.screen, WelcomeScreen))
        await pilot.press("ctrl+n")
        await until(pilot, lambda: isinstance(pilot.app.screen, StepScreen))

    drive(app_of({"data": {"train": []}}, welcome=True), how)


def test_the_palette_has_the_screens_in_their_order(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await pilot.press("ctrl+p")
        await until(pilot, lambda: "Go to: Modality" in screen_text(pilot))
        text = screen_text(pilot)
        places = [text.index(f"Screen {number}") for number in (1, 2, 3, 4)]
        assert places == sorted(places)

    drive(app_of(VALUES), how)


def test_a_screen_that_is_gone_is_no_error(place: Path) -> None:
    """Enter twice in a slow palette took the screen below with it, and the wizard fell."""

    async def how(pilot: Pilot[list[str]]) -> None:
        await pilot.app.pop_screen()
        pilot.app.go(3)  # type: ignore[attr-defined]
        await until(pilot, lambda: "4 of 11" in screen_text(pilot))

    drive(app_of(VALUES), how)
