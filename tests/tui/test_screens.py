"""The screens of the questions, driven by keys; snapshots of each at two sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Button, Input, TextArea

from ms4_wizard import project, writing
from ms4_wizard.answers import Answers
from ms4_wizard.screens.done import DoneScreen
from ms4_wizard.screens.help import HelpScreen
from ms4_wizard.steps import NUMBERS, STEPS
from ms4_wizard.widgets.answer import CONTROLS, Answer
from ms4_wizard.widgets.choices import Choices
from tests.tui.conftest import contents
from tests.tui.driving import (
    VALUES,
    answer,
    app_of,
    drive,
    go_to,
    peak,
    plan,
    review,
    screen_text,
    shown,
    until,
)

pytestmark = pytest.mark.slow

# From the first screen to the project.


def test_from_nothing_to_a_project(place: Path) -> None:
    """With keys only: each screen in turn, its answer changed."""

    async def how(pilot: Pilot[list[str]]) -> None:
        await pilot.press("down", "down", "space")  # the CPU
        await go_to(pilot, "data")
        await pilot.press(*"train.jsonl")
        await go_to(pilot, "reasoning")
        await pilot.press("down", "enter")
        await go_to(pilot, "method")
        await pilot.press("ctrl+u", *"tiny")
        await go_to(pilot, "memory")
        await pilot.press(*"4", "tab", "down", "enter")
        await go_to(pilot, "adapters")
        await pilot.press("enter", "down", "down", "enter", "tab", "ctrl+u", *"4")
        await pilot.press("tab", *"2", "ctrl+n")
        await go_to(pilot, "training")
        await pilot.press("ctrl+u", *"256")
        # What is typed at once after Tab can still reach the control before it.
        line = answer(pilot, "train.accumulation").query_one(Input)
        line.focus()
        await until(pilot, lambda: line.has_focus)
        await pilot.press("ctrl+u", *"2")
        await go_to(pilot, "where")
        await pilot.press("down", "enter", "tab", *"gpu", "tab", *"me", "tab", *"5", "tab")
        await pilot.press("down", "enter")
        await go_to(pilot, "evaluation")
        await pilot.press(*"held = sets/test.jsonl", "tab", "tab", "tab", "tab")
        thresholds = answer(pilot, "evaluate.min_exact_match").query_one(TextArea)
        await until(pilot, lambda: thresholds.has_focus)
        await pilot.press(*"held = 0.5")
        await review(pilot)
        await pilot.press("ctrl+s")
        await until(pilot, lambda: isinstance(pilot.app.screen, DoneScreen))
        assert "snakemake --profile slurm" in screen_text(pilot)
        await pilot.press("enter")

    told = drive(app_of({}), how)
    assert told is not None
    assert told[-1] == "  snakemake --profile slurm"
    read = project.read_project(place / "project")
    wanted = Answers.model_validate(
        {
            "model": {"source": "tiny", "experts": "fp8"},
            "data": {
                "train": ["train.jsonl"],
                "test": {"held": "sets/test.jsonl"},
                "reasoning": "high",
                "sequence_length": 256,
            },
            "adapters": {"targets": ["shared", "experts"], "rank": 4, "expert_rank": 2},
            # The rest of the numbers is computed: of a tiny model, and of data that is small.
            "train": read.train.model_dump() | {"accumulation": 2, "learning_rate": 0.002},
            "evaluate": {"min_exact_match": {"held": 0.5}},
            "run": {"device": "cpu", "memory_gib": 4},
            "where": {
                **{"run": "slurm", "partition": "gpu", "account": "me", "hours": 5},
                "requeue": "always",
            },
        }
    )
    assert read.model_dump() == wanted.model_dump()


def test_same_bytes_as_headless(place: Path) -> None:
    draft = None

    async def how(pilot: Pilot[list[str]]) -> None:
        nonlocal draft
        screen = await review(pilot)
        draft = screen.flow.draft
        await pilot.press("ctrl+s")
        await pilot.pause()

    drive(app_of(VALUES, "screens"), how)
    assert draft is not None
    writing.write_from_answers(Answers.model_validate(draft.values), Path("headless"))
    assert contents(place / "headless") == contents(place / "screens")


# Each screen.


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.key)
def test_screen_asks_its_questions_and_goes_back(place: Path, step: Any) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, step.key)
        asked = [widget.question for widget in pilot.app.screen.query(Answer)]
        assert tuple(asked) == step.questions
        first = pilot.app.screen.query(CONTROLS).first()
        await until(pilot, lambda: pilot.app.screen.focused is first)
        if step.key == STEPS[0].key:
            assert pilot.app.screen.query_one("#back", Button).disabled
            return
        await pilot.press("escape")
        await pilot.pause()
        assert pilot.app.screen.step.key == STEPS[NUMBERS[step.key] - 1].key  # type: ignore[attr-defined]

    drive(app_of(VALUES), how)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.key)
@pytest.mark.parametrize("size", [(80, 24), (140, 45)], ids=str)
def test_no_text_is_cut(place: Path, step: Any, size: tuple[int, int]) -> None:
    """What each question asks is whole, with the advice of the one that has the focus, and each
    can be scrolled to by Tab."""

    async def how(pilot: Pilot[list[str]]) -> None:
        pilot.app.go(NUMBERS[step.key])  # type: ignore[attr-defined]
        await until(pilot, lambda: pilot.app.screen.query(Answer))
        await pilot.pause()
        for widget in pilot.app.screen.query(Answer):
            if not widget.display:
                continue
            widget.control.focus()
            await until(pilot, lambda w=widget: w.control.has_focus)
            await pilot.pause()
            text = " ".join(screen_text(pilot).split())
            flat = "".join(c for c in text if c not in "│▄▁▏")
            assert widget.question.ask.split()[0] in flat
            crowded = step.key == "training" and size[1] < 30 and "row" in widget.classes
            where = pilot.app.screen if crowded else widget
            advice = where.query_one("#advice" if crowded else ".advice")
            assert str(advice.render()) == widget.question.advice
            for part in (widget.query_one(".ask"), advice):
                assert pilot.app.screen.region.contains_region(part.region), part
                words = str(part.render())
                lines = part.region.height
                assert lines * part.region.width >= len(words), "wrapped into too little room"

    drive(app_of({**VALUES, "where": {"run": "slurm"}}), how, size)


def test_going_back_loses_nothing(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "adapters")
        await pilot.press("down", "down", "enter", "tab", "ctrl+u", *"not a number")
        assert "whole number" in shown(pilot)
        # Back is open with a fault on the screen, and what was typed is there again.
        for _ in range(NUMBERS["adapters"] - NUMBERS["data"]):
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
    ("step", "field", "text", "message"),
    [
        ("data", "data.train", "", "name at least one"),
        ("data", "data.train", "nowhere.jsonl", "no such file: nowhere.jsonl"),
        ("data", "data.train", "sets", "no such file: sets"),
        ("data", "data.train", "a\nb", "no such file: a; no such file: b"),
        ("data", "data.train", "x" * 300, "File name too long"),
        ("evaluation", "data.test", "held = nowhere", "held: no such file: nowhere"),
        ("evaluation", "data.test", "a = train.jsonl\na = train.jsonl", "`a` is given twice"),
        ("evaluation", "data.test", "train.jsonl", "`train.jsonl`: write name = …"),
        ("evaluation", "evaluate.min_exact_match", "held = 2", "2.0 is not between 0 and 1"),
        ("evaluation", "evaluate.min_exact_match", "other = 1", "no held-out set is called other"),
        ("evaluation", "evaluate.min_exact_match", "held = most", "write a number"),
    ],
)
def test_lines_that_are_wrong(place: Path, step: str, field: str, text: str, message: str) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, step)
        answer(pilot, field).query_one(TextArea).text = text
        await pilot.pause()
        await pilot.press("ctrl+n")
        await pilot.pause()
        assert pilot.app.screen.step.key == step  # type: ignore[attr-defined]
        assert message in shown(pilot)
        assert answer(pilot, field).query_one(TextArea).text == text, "as it was typed"

    drive(app_of(VALUES), how)


@pytest.mark.parametrize(
    ("step", "field", "text", "message"),
    [
        ("memory", "run.memory_gib", "-1", "must be more than 0"),
        ("memory", "run.memory_gib", "much", "write a number"),
        ("adapters", "adapters.rank", "0", "must be 1 or more"),
        ("adapters", "adapters.alpha", "", "write a number"),
        ("training", "data.sequence_length", "15", "must be 16 or more"),
        ("training", "train.micro_batch", "1.5", "whole number"),
        ("training", "train.learning_rate", "2", "must be 1 or less"),
        ("training", "train.epochs", "0", "must be more than 0"),
        ("where", "where.partition", "$(reboot)", "match pattern"),
        ("where", "where.hours", "9999", "must be 8760 or less"),
        ("evaluation", "evaluate.max_samples", "0", "must be 1 or more"),
    ],
)
def test_numbers_that_are_wrong(
    place: Path, step: str, field: str, text: str, message: str
) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, step)
        line = answer(pilot, field).query_one(Input)
        line.focus()
        line.value = text
        await pilot.pause()
        assert message in shown(pilot), "at once, not only after Next"
        await pilot.press("ctrl+n")
        await pilot.pause()
        assert pilot.app.screen.step.key == step  # type: ignore[attr-defined]
        assert pilot.app.screen.focused is line

    drive(app_of({**VALUES, "where": {"run": "slurm"}}), how)


def test_nothing_is_wrong_before_anything_is_typed(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "data")
        assert shown(pilot) == ""
        await pilot.press("ctrl+n")
        await pilot.pause()
        assert shown(pilot) == "is needed"

    drive(app_of({}), how)


def test_text_that_cannot_be_typed_is_shown_and_kept(place: Path) -> None:
    """A line break, and what a terminal would take for a command."""
    names = ["new\nline", "bell\x1b]0;title\x07"]
    for name in names:
        (place / name).write_bytes((place / "train.jsonl").read_bytes())

    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "data")
        text = answer(pilot, "data.train").query_one(TextArea)
        assert text.disabled
        assert "\x1b" not in text.text
        assert "bell\\x1b]0;title" in text.text
        await review(pilot)
        assert "\x1b" not in screen_text(pilot)
        await pilot.press("ctrl+s")
        await until(pilot, lambda: isinstance(pilot.app.screen, DoneScreen))
        await pilot.press("enter")

    assert drive(app_of({**VALUES, "data": {"train": names}}), how) is not None
    assert project.read_project(place / "project").data.train == tuple(names)


def test_thresholds_of_sets_that_are_gone_go_with_them(place: Path) -> None:
    """Otherwise the review would refuse what no screen can mend."""
    values = {**VALUES, "evaluate": {"min_exact_match": {"held": 0.5}}}

    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "evaluation")
        answer(pilot, "data.test").query_one(TextArea).text = "other = sets/test.jsonl"
        thresholds = answer(pilot, "evaluate.min_exact_match").query_one(TextArea)
        await until(pilot, lambda: thresholds.text == "")
        await review(pilot)
        await pilot.press("ctrl+s")
        await pilot.pause()

    drive(app_of(values), how)
    assert project.read_project(place / "project").evaluate.min_exact_match == {}


def test_a_revision_goes_with_its_model(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "method")
        await pilot.press("ctrl+u", *"tiny")
        flow = pilot.app.screen.flow  # type: ignore[attr-defined]
        assert flow.draft.get("model.revision") is None

    drive(app_of({**VALUES, "model": {"revision": "abc"}}), how)


def test_blank_lines_can_be_typed(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "data")
        await pilot.press("end", "enter", "enter", *"other.jsonl")
        await pilot.pause()
        text = answer(pilot, "data.train").query_one(TextArea)
        assert text.text == "train.jsonl\n\nother.jsonl"
        assert pilot.app.screen.flow.draft.get("data.train") == ["train.jsonl", "other.jsonl"]  # type: ignore[attr-defined]

    drive(app_of(VALUES), how)


def test_mouse(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "memory")
        choices = pilot.app.screen.query_one(Choices)
        await pilot.click(choices, offset=(4, 2))
        await pilot.pause()
        assert pilot.app.screen.flow.draft.get("model.experts") == "fp8"  # type: ignore[attr-defined]
        await pilot.click("#back")
        await pilot.pause()
        assert pilot.app.screen.step.key == "method"  # type: ignore[attr-defined]
        await pilot.click("#next")
        await pilot.pause()
        assert pilot.app.screen.step.key == "memory"  # type: ignore[attr-defined]

    drive(app_of(VALUES), how)


# Help, the palette, themes, sizes.


@pytest.mark.parametrize("key", ["question_mark", "f1"])
def test_help_of_the_question_that_has_the_focus(place: Path, key: str) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "adapters")
        await pilot.press("tab", key)  # the rank: a number holds no `?`
        await pilot.pause()
        assert isinstance(pilot.app.screen, HelpScreen)
        text = screen_text(pilot)
        assert "Rank" in text
        assert "adapters.rank" in text
        assert "adapters.targets" not in text
        await pilot.press("escape")
        await pilot.pause()
        assert pilot.app.screen.flow.draft.get("adapters.rank") == 32  # type: ignore[attr-defined]

    drive(app_of(VALUES), how)


def test_a_path_can_hold_a_question_mark(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "method")
        await pilot.press("ctrl+u", "question_mark")
        await pilot.pause()
        assert isinstance(pilot.app.screen, HelpScreen), "where nothing is typed yet"
        await pilot.press("escape", "a", "question_mark")
        await pilot.pause()
        assert pilot.app.screen.flow.draft.get("model.source") == "a?"  # type: ignore[attr-defined]
        await pilot.press("f1")
        await pilot.pause()
        assert isinstance(pilot.app.screen, HelpScreen)

    drive(app_of(VALUES), how)


def test_palette_goes_anywhere(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await pilot.press("ctrl+p")
        await until(pilot, lambda: pilot.app.screen.query("CommandInput"))
        await pilot.press(*"evaluation")
        await until(pilot, lambda: "Go to: Evaluation" in screen_text(pilot))
        await pilot.press("down", "enter")
        await until(pilot, lambda: pilot.app.screen.query("#answer-data-test"))

    drive(app_of(VALUES), how)


def test_light_and_dark_stay_as_they_were_chosen(place: Path) -> None:
    from ms4_wizard.preferences import Preferences

    kept = Preferences(place / "state")

    async def how(pilot: Pilot[list[str]]) -> None:
        assert pilot.app.current_theme.dark
        await pilot.press("ctrl+t")
        assert not pilot.app.current_theme.dark

    async def again(pilot: Pilot[list[str]]) -> None:
        assert not pilot.app.current_theme.dark

    drive(app_of(VALUES, preferences=kept), how)
    drive(app_of(VALUES, preferences=kept), again)
    (place / "state/wizard.json").write_text('{"theme": ["x"]}')
    drive(app_of(VALUES, preferences=kept), how)


def test_without_colours(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks and bars are told apart by their characters."""
    monkeypatch.setenv("NO_COLOR", "1")

    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "memory")
        text = screen_text(pilot)
        assert "● nf4" in text
        assert "○ fp8" in text
        assert len({line[0] for line in plan(pilot).splitlines()[3:9]}) >= 3
        colours = {
            segment.style.color
            for strip in pilot.app.screen._compositor.render_strips()
            for segment in strip
            if segment.style is not None and segment.style.color is not None
        }
        for colour in colours:
            assert colour.triplet is None or len(set(colour.triplet)) == 1, colour

    drive(app_of(VALUES), how)


def test_resize(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "training")
        assert "process" not in plan(pilot), "small components are together on a small screen"
        await pilot.resize_terminal(140, 45)
        await until(pilot, lambda: "process" in plan(pilot))
        await pilot.resize_terminal(60, 20)
        await until(pilot, lambda: not pilot.app.screen.query_one("#side").display)
        await pilot.press("ctrl+u", *"512")
        await pilot.resize_terminal(80, 24)
        await until(pilot, lambda: pilot.app.screen.query_one("#side").display)
        assert pilot.app.screen.flow.draft.get("data.sequence_length") == "512"  # type: ignore[attr-defined]
        assert peak(pilot) > 0

    drive(app_of(VALUES), how)


# Snapshots: `pytest tests/tui/test_screens.py --snapshot-update` after a change that is meant.


@pytest.mark.parametrize("size", [(80, 24), (140, 45)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("key", ["welcome", *NUMBERS, "review", "help", "files", "edit", "done"])
def test_snapshot(place: Path, snap_compare: Any, key: str, size: tuple[int, int]) -> None:
    values = {**VALUES, "where": {"run": "slurm", "partition": "gpu"}}
    over_review = ("review", "files", "edit", "done")
    app = app_of(values, opened=key in over_review, welcome=key == "welcome")

    async def before(pilot: Pilot[Any]) -> None:
        await pilot.app.workers.wait_for_complete()  # else it still looks at the machine
        keys = {"files": "ctrl+d", "done": "ctrl+s", "help": "f1"}
        if key in NUMBERS:
            pilot.app.go(NUMBERS[key])  # type: ignore[attr-defined]
            await until(pilot, lambda: getattr(pilot.app.screen, "number", -1) == NUMBERS[key])
        first = pilot.app.screen
        await until(pilot, lambda: first.focused is not None and first.focused.has_focus)
        if key == "edit":
            first.query_one("#answers").focus()
            await pilot.press("down", "enter")
        elif key in keys:
            await pilot.press(keys[key])
        if key in (*keys, "edit"):
            await until(pilot, lambda: pilot.app.screen is not first)
        screen = pilot.app.screen
        if key in NUMBERS or key == "review":
            # A cursor blinks, so the focus leaves it; by messages, which a pause does not outlast.
            button = screen.query_one("#next, #write", Button)
            old = screen.focused
            button.focus()
            await until(pilot, lambda: button.has_focus)
            await until(pilot, lambda: old is button or old is None or not old.has_focus)
        await until(pilot, lambda: screen.focused is not None and screen.focused.has_focus)
        await pilot.pause()

    assert snap_compare(app, terminal_size=size, run_before=before)
