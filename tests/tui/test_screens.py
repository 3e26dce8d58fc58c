"""The screens, driven by keys; one snapshot of each."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Button, Input, OptionList, TextArea

from ms4_wizard import cli, project
from ms4_wizard.app import WizardApp
from ms4_wizard.flow import Flow
from ms4_wizard.questions import STEPS, Answers, Draft
from ms4_wizard.screens.review import ReviewScreen
from ms4_wizard.screens.step import StepScreen
from ms4_wizard.widgets.answer import Answer
from ms4_wizard.widgets.choices import Choices
from ms4_wizard.widgets.plan import PlanPanel
from tests.tui.conftest import contents

# A machine of a known size: the plan on the screens depends on it.
VALUES: dict[str, Any] = {
    "data": {"train": ["train.jsonl"], "test": {"held": "sets/test.jsonl"}},
    "run": {"device": "cuda", "memory_gib": 79},
}
NUMBERS = {step.key: number for number, step in enumerate(STEPS)}

Drive = Callable[[Pilot[list[str]]], Awaitable[None]]


def app_of(values: dict[str, Any], directory: str = "project", opened: bool = False) -> WizardApp:
    return WizardApp(Flow(Draft(values), Path(directory), cli.write_from_answers, opened=opened))


def drive(app: WizardApp, how: Drive, size: tuple[int, int] = (80, 24)) -> list[str] | None:
    """Run the app and drive it; what it returns."""

    async def run() -> list[str] | None:
        async with app.run_test(size=size) as pilot:
            await app.workers.wait_for_complete()  # it looks at the machine
            await pilot.pause()
            await how(pilot)
        return app.return_value

    return asyncio.run(run())


async def go_to(pilot: Pilot[Any], key: str) -> None:
    """Press Next until a step is there."""
    while not (isinstance(pilot.app.screen, StepScreen) and pilot.app.screen.step.key == key):
        before = pilot.app.screen
        await pilot.press("ctrl+n")
        await pilot.pause()
        assert pilot.app.screen is not before, "Next did not go on"


async def until(pilot: Pilot[Any], condition: Callable[[], object]) -> None:
    """Let the app work until a condition holds."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "the screen does not come to rest"
        await pilot.pause()


def answer(pilot: Pilot[Any], field: str) -> Answer:
    return pilot.app.screen.query_one(f"#answer-{field.replace('.', '-')}", Answer)


def shown(pilot: Pilot[Any]) -> str:
    """The faults that the screen shows."""
    faults = [w for w in pilot.app.screen.query(".fault") if w.display]
    return "\n".join(str(fault.render()) for fault in faults)


def plan(pilot: Pilot[Any]) -> str:
    """The panel's text, as it is drawn."""
    panel = pilot.app.screen.query_one(PlanPanel)
    return "\n".join(strip.text for strip in panel.render_lines(panel.size.region))


def peak(pilot: Pilot[Any]) -> float:
    found = re.search(r"at its fullest, GiB +([\d.]+)", plan(pilot))
    assert found is not None, plan(pilot)
    return float(found[1])


# From the first screen to the project.


def test_from_nothing_to_a_project(place: Path) -> None:
    """With keys only: each screen in turn, its answer changed."""

    async def how(pilot: Pilot[list[str]]) -> None:
        flow = pilot.app.screen.flow  # type: ignore[attr-defined]
        await pilot.press("ctrl+u", *"tiny", "tab")
        await pilot.press(*"train.jsonl", "tab", *"held = sets/test.jsonl")
        await pilot.press("ctrl+n")
        assert flow.draft.get("model.source") == "tiny"
        await go_to(pilot, "reasoning")
        await pilot.press("down", "enter", "ctrl+n")
        await go_to(pilot, "memory")
        await pilot.press("down", "down", "space", "tab", *"4", "tab", "ctrl+u", *"256", "ctrl+n")
        await go_to(pilot, "experts")
        await pilot.press("down", "enter", "ctrl+n")
        await go_to(pilot, "adapters")
        await pilot.press("enter", "down", "down", "enter", "tab", "ctrl+u", *"4", "ctrl+n")
        await go_to(pilot, "where")
        await pilot.press("down", "enter", "tab", *"gpu", "tab", *"me", "tab", *"5", "ctrl+n")
        await pilot.pause()
        assert isinstance(pilot.app.screen, ReviewScreen)
        await pilot.press("ctrl+s")

    told = drive(app_of({}), how)
    assert told is not None
    assert told[-1] == "  snakemake --profile slurm"
    read = project.read_project(place / "project")
    assert read == Answers.model_validate(
        {
            "model": {"source": "tiny", "experts": "fp8"},
            "data": {
                "train": ["train.jsonl"],
                "test": {"held": "sets/test.jsonl"},
                "reasoning": "high",
                "sequence_length": 256,
            },
            "adapters": {"targets": ["shared", "experts"], "rank": 4},
            "run": {"device": "cpu", "memory_gib": 4},
            "where": {"run": "slurm", "partition": "gpu", "account": "me", "hours": 5},
        }
    )


def test_same_bytes_as_headless(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "where")
        await pilot.press("ctrl+n")
        await pilot.pause()
        await pilot.press("ctrl+s")

    drive(app_of(VALUES, "screens"), how)
    cli.write_from_answers(Answers.model_validate(VALUES), Path("headless"))
    assert contents(place / "headless") == contents(place / "screens")


# Each screen.


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.key)
def test_screen_asks_its_questions_and_goes_back(place: Path, step: Any) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, step.key)
        asked = [widget.question for widget in pilot.app.screen.query(Answer)]
        assert tuple(asked) == step.questions
        assert peak(pilot) == 72.77
        first = pilot.app.screen.query("Input, TextArea, Choices").first()
        assert pilot.app.screen.focused is first
        if step.key == "data":
            assert pilot.app.screen.query_one("#back", Button).disabled
            return
        await pilot.press("escape")
        await pilot.pause()
        assert pilot.app.screen.step.key == STEPS[NUMBERS[step.key] - 1].key  # type: ignore[attr-defined]

    drive(app_of(VALUES), how)


def test_going_back_loses_nothing(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "adapters")
        await pilot.press("down", "down", "enter", "tab", "ctrl+u", *"not a number")
        assert "valid integer" in shown(pilot)
        # Back is open with a fault on the screen, and what was typed is there again.
        for _ in range(6):
            await pilot.press("escape")
            await pilot.pause()
        assert pilot.app.screen.step.key == "data"  # type: ignore[attr-defined]
        assert answer(pilot, "data.train").query_one(TextArea).text == "train.jsonl"
        await go_to(pilot, "adapters")
        assert answer(pilot, "adapters.rank").query_one(Input).value == "not a number"
        assert pilot.app.screen.flow.draft.get("adapters.targets") == [  # type: ignore[attr-defined]
            *("attention", "shared", "experts")
        ]
        # Forward is not.
        await pilot.press("ctrl+n")
        await pilot.pause()
        assert pilot.app.screen.step.key == "adapters"  # type: ignore[attr-defined]
        assert pilot.app.screen.focused is answer(pilot, "adapters.rank").query_one(Input)

    drive(app_of(VALUES), how)


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("data.train", "", "at least 1 item"),
        ("data.train", "nowhere.jsonl", "no such file: nowhere.jsonl"),
        ("data.train", "sets", "no such file: sets"),
        ("data.train", "a\nb", "no such file: a; no such file: b"),
        ("data.train", "x" * 300, "File name too long"),
        ("data.test", "held = nowhere", "held: no such file: nowhere"),
        ("data.test", "a = train.jsonl\na = train.jsonl", "`a` is given twice"),
        ("data.test", "train.jsonl", "`train.jsonl`: write name = path"),
    ],
)
def test_data_that_is_not_there(place: Path, field: str, text: str, message: str) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        answer(pilot, field).query_one(TextArea).text = text
        await pilot.press("ctrl+n")
        await pilot.pause()
        assert pilot.app.screen.step.key == "data"  # type: ignore[attr-defined]
        assert message in shown(pilot)

    drive(app_of(VALUES), how)


def test_nothing_is_wrong_before_anything_is_typed(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        assert shown(pilot) == ""
        await pilot.press("ctrl+n")
        await pilot.pause()
        assert shown(pilot) == "is needed"

    drive(app_of({}), how)


def test_the_plan_follows_each_key(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "memory")
        before = peak(pilot)
        assert "fits: 6.2 GiB left of 79.0 GiB" in plan(pilot)
        await pilot.press("tab", "tab", "end", "0")  # 20480 tokens
        await pilot.pause()
        # Not always more: `auto` computes more again where memory is short.
        assert peak(pilot) != before
        await pilot.press("0")
        await pilot.pause()
        assert "does not fit" in plan(pilot)
        await pilot.press("x")
        await pilot.pause()
        assert "No plan yet. data.sequence_length:" in plan(pilot)
        await pilot.press("backspace", "backspace", "backspace")
        await pilot.pause()
        assert peak(pilot) == before

    drive(app_of(VALUES), how)


def test_review_goes_to_an_answer_and_refuses_what_does_not_fit(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "where")
        await pilot.press("ctrl+n")
        await pilot.pause()
        options = pilot.app.screen.query_one("#answers", OptionList)
        wanted = [n for n, o in enumerate(options.options) if "run.memory_gib" in str(o.id)]
        options.focus()
        options.highlighted = wanted[0]
        await pilot.press("enter")
        await pilot.pause()
        assert pilot.app.screen.step.key == "memory"  # type: ignore[attr-defined]
        await pilot.press("tab", "ctrl+u", *"48")
        await go_to(pilot, "where")
        await pilot.press("ctrl+n")
        await pilot.pause()
        await pilot.press("ctrl+s")
        await pilot.pause()
        assert "the run does not fit: it needs" in shown(pilot)
        assert not (place / "project").exists()
        await pilot.press("ctrl+q")

    assert drive(app_of(VALUES), how) is None


def test_review_of_wrong_answers_names_them(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        assert "method: `full` does not run" in shown(pilot)
        await pilot.press("ctrl+s")
        assert "method: `full` does not run" in shown(pilot)

    drive(app_of({**VALUES, "method": "full"}, opened=True), how)


def test_review_needs_a_directory(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        pilot.app.screen.query_one("#directory", Input).value = " "
        await pilot.press("ctrl+s")
        await pilot.pause()
        assert shown(pilot) == "Give the project a directory."
        pilot.app.screen.query_one("#directory", Input).value = "sets"
        await pilot.press("ctrl+s")
        await pilot.pause()
        assert "sets: holds something that is not an ms4 project" in shown(pilot)
        pilot.app.screen.query_one("#directory", Input).value = "fresh"
        await pilot.press("ctrl+s")

    assert drive(app_of(VALUES, opened=True), how) is not None
    assert (place / "fresh/Snakefile").is_file()


def test_project_that_exists_opens_with_its_answers(place: Path, answers: Answers) -> None:
    cli.write_from_answers(answers, Path("project"))
    file = place / "project/config/config.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: 9") + "# mine\n")
    read = project.read_project(Path("project"))

    async def how(pilot: Pilot[list[str]]) -> None:
        text = "\n".join(
            str(option.prompt)
            for option in pilot.app.screen.query_one("#answers", OptionList).options
        )
        assert "data.train  train.jsonl" in text
        assert "where.account  007" in text
        pilot.app.screen.flow.draft.set("adapters.rank", 5)  # type: ignore[attr-defined]
        overwrite = pilot.app.screen.query_one("#overwrite")
        assert not overwrite.display
        await pilot.press("ctrl+s")
        await pilot.pause()
        assert "these files were edited" in shown(pilot)
        assert overwrite.display
        overwrite.focus()
        await pilot.press("space", "ctrl+s")

    app = WizardApp(Flow(Draft.of(read), Path("project"), cli.write_from_answers, opened=True))
    told = drive(app, how)
    assert told is not None
    assert "seed: 9" in file.read_text()
    assert file.with_name("config.yaml.bak").read_text().endswith("# mine\n")


@pytest.mark.parametrize("note", ["[]", "{"])
def test_review_of_a_directory_with_a_damaged_note(
    place: Path, answers: Answers, note: str
) -> None:
    cli.write_from_answers(answers, Path("broken"))
    (place / "broken/config/project.json").write_text(note)

    async def how(pilot: Pilot[list[str]]) -> None:
        pilot.app.screen.query_one("#directory", Input).value = "broken"
        await pilot.press("ctrl+s")
        await pilot.pause()
        assert "not the note that the wizard wrote" in shown(pilot)
        pilot.app.screen.query_one("#directory", Input).value = "n" * 300
        await pilot.press("ctrl+s")
        await pilot.pause()
        assert "cannot be used (File name too long)" in shown(pilot)

    drive(app_of(VALUES, opened=True), how)


def test_text_that_cannot_be_typed_is_shown_and_kept(place: Path) -> None:
    """A line break, and what a terminal would take for a command."""
    names = ["new\nline", "bell\x1b]0;title\x07"]
    for name in names:
        (place / name).write_bytes((place / "train.jsonl").read_bytes())

    async def how(pilot: Pilot[list[str]]) -> None:
        text = answer(pilot, "data.train").query_one(TextArea)
        assert text.disabled
        assert "\x1b" not in text.text
        assert "bell\\x1b]0;title" in text.text
        await go_to(pilot, "where")
        await pilot.press("ctrl+n")
        await pilot.pause()
        drawn = pilot.app.export_screenshot()
        assert "\x1b" not in drawn
        await pilot.press("ctrl+s")

    assert drive(app_of({**VALUES, "data": {"train": names}}), how) is not None
    assert project.read_project(place / "project").data.train == tuple(names)


def test_thresholds_of_sets_that_are_gone_go_with_them(place: Path) -> None:
    """Otherwise the review would refuse what no screen can mend."""
    values = {**VALUES, "evaluate": {"min_exact_match": {"held": 0.5}}}

    async def how(pilot: Pilot[list[str]]) -> None:
        answer(pilot, "data.test").query_one(TextArea).text = "other = sets/test.jsonl"
        await go_to(pilot, "where")
        await pilot.press("ctrl+n")
        await pilot.pause()
        await pilot.press("ctrl+s")

    assert drive(app_of(values), how) is not None
    assert project.read_project(place / "project").evaluate.min_exact_match == {}


def test_another_project_is_not_replaced_without_a_word(place: Path, answers: Answers) -> None:
    cli.write_from_answers(answers, Path("project"))

    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "where")
        await pilot.press("ctrl+n")
        await pilot.pause()
        await pilot.press("ctrl+s")
        await pilot.pause()
        assert "holds another project" in shown(pilot)
        fault = pilot.app.screen.query_one("#fault")
        assert pilot.app.screen.region.contains_region(fault.region), "in sight at 80 x 24"
        pilot.app.screen.query_one("#overwrite").focus()
        await pilot.press("space", "ctrl+s")

    assert drive(app_of(VALUES), how) is not None
    assert project.read_project(place / "project").data.reasoning == "per_sample"
    assert project.read_project(place / "project").run.device == "cuda"


def test_a_revision_goes_with_its_model(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await pilot.press("ctrl+u", *"tiny")
        flow = pilot.app.screen.flow  # type: ignore[attr-defined]
        assert flow.draft.get("model.revision") is None

    drive(app_of({**VALUES, "model": {"revision": "abc"}}), how)


def test_mouse(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "experts")
        choices = pilot.app.screen.query_one(Choices)
        await pilot.click(choices, offset=(4, 2))
        await pilot.pause()
        assert pilot.app.screen.flow.draft.get("model.experts") == "fp8"  # type: ignore[attr-defined]
        await pilot.click("#back")
        await pilot.pause()
        assert pilot.app.screen.step.key == "memory"  # type: ignore[attr-defined]
        await pilot.click("#next")
        await pilot.pause()
        assert pilot.app.screen.step.key == "experts"  # type: ignore[attr-defined]

    drive(app_of(VALUES), how)


# Snapshots: `pytest tests/tui/test_screens.py --snapshot-update` after a change that is meant.


@pytest.mark.parametrize("key", [*NUMBERS, "review"])
def test_snapshot(place: Path, snap_compare: Any, key: str) -> None:
    values = {**VALUES, "where": {"run": "slurm", "partition": "gpu"}}
    app = app_of(values, opened=key == "review")

    async def before(pilot: Pilot[Any]) -> None:
        await pilot.app.workers.wait_for_complete()  # else it still looks at the machine
        if key != "review":
            await go_to(pilot, key)
        screen = pilot.app.screen
        # A cursor that blinks is there or not, so the focus leaves the control that a new screen
        # gives it to. Giving and leaving are messages, which a pause does not always outlast.
        await until(pilot, lambda: screen.focused is not None and screen.focused.has_focus)
        first = screen.focused
        button = screen.query_one("#next, #write", Button)
        button.focus()
        await until(pilot, lambda: button.has_focus and (first is button or not first.has_focus))

    assert snap_compare(app, terminal_size=(80, 24), run_before=before)
