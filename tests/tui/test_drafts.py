"""Drafts: a terminal that is closed loses nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import OptionList

from ms4_wizard import drafts, merge, writing
from ms4_wizard.answers import Answers
from ms4_wizard.draft import Draft
from ms4_wizard.flow import Flow
from ms4_wizard.screens.done import DoneScreen
from ms4_wizard.screens.review import ReviewScreen
from ms4_wizard.screens.step import StepScreen
from ms4_wizard.steps import QUESTIONS
from tests.tui.driving import VALUES, answer, app_of, drive, go_to, review, screen_text, until


def test_what_is_computed_after_writing_is_no_draft(place: Path) -> None:
    """The data may still be read when the project is written."""
    store = drafts.Store(Path("project"), place / "state")
    flow = Flow(Draft({"data": {"train": ["train.jsonl"]}}), Path("project"), store=store)
    flow.save()
    assert not store.is_empty()
    flow.written(Path("project"))
    flow.draft.compute("train.epochs", 3.0)
    flow.save()
    assert store.is_empty()
    for rank, kept in ((8, True), (16, True)):
        flow.draft.set("adapters.rank", rank)
        flow.save()
        assert store.is_empty() is not kept
    flow.written(Path("project"))
    flow.draft.set("adapters.rank", 8)
    flow.save()
    flow.draft.set("adapters.rank", 16)
    flow.save()
    assert store.is_empty(), "what was written again"


@pytest.mark.slow
def test_each_key_is_kept(place: Path) -> None:
    store = drafts.Store(Path("project"), place / "state")

    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "method")
        await pilot.press("ctrl+u", *"tin")
        await pilot.pause()
        kept = store.load()
        assert kept is not None
        assert kept.draft.get("model.source") == "tin", "nobody pressed Next or Quit"
        await go_to(pilot, "evaluation")
        await pilot.press("end", "enter", *"half a li")
        await pilot.pause()

    drive(app_of(VALUES, state=place / "state"), how)
    kept = store.load()
    assert kept is not None
    assert kept.directory == "project"
    assert kept.draft.text(QUESTIONS["data.test"]) == "held = sets/test.jsonl\nhalf a li"


def test_a_line_that_is_typed_half_is_more_than_no_draft(place: Path) -> None:
    """Its values are those of a new project: what was typed stands beside them."""
    directory, store = Path("project"), drafts.Store(Path("project"), place / "state")
    draft = Draft({"data": {"test": {}}})
    draft.answer(QUESTIONS["data.test"], "half a li")
    store.save(draft, "project")
    kept = store.load()
    assert kept is not None
    same = Draft({"data": {"test": {}}})
    assert kept.draft.values == same.values
    assert kept.adds_to(same, directory)
    assert kept.count == 1
    assert kept.draft.text(QUESTIONS["data.test"]) == "half a li"
    assert not kept.adds_to(draft, Path("x/../project")), "it says nothing else"
    assert kept.adds_to(draft, Path("other")), "where to write was typed, too"


def test_draft_is_offered_and_goes_on(place: Path) -> None:
    store = drafts.Store(Path("project"), place / "state")
    store.save(Draft({**VALUES, "adapters": {"rank": "many"}}), "project")
    kept = store.load()
    assert kept is not None
    assert kept.count == 5

    async def how(pilot: Pilot[list[str]]) -> None:
        assert "Go on with the draft" in screen_text(pilot)
        assert "5 answers, for project" in screen_text(pilot)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(pilot.app.screen, StepScreen))
        await go_to(pilot, "adapters")
        assert answer(pilot, "adapters.rank").control.value == "many"  # type: ignore[attr-defined]

    drive(app_of({}, state=place / "state", kept=kept), how)


def test_draft_of_a_project_can_be_left(place: Path, answers: Answers) -> None:
    writing.write_from_answers(answers, Path("project"))
    store = drafts.Store(Path("project"), place / "state")
    store.save(Draft({**VALUES, "seed": 7}), "project")
    values = Draft.of(answers).values

    async def how(pilot: Pilot[list[str]]) -> None:
        options = pilot.app.screen.query_one(OptionList)
        assert [option.id for option in options.options][:2] == ["draft", "as-is"]
        await pilot.press("down", "enter")
        await until(pilot, lambda: isinstance(pilot.app.screen, ReviewScreen))
        assert pilot.app.flow.draft.get("seed") == 0  # type: ignore[attr-defined]

    drive(app_of(values, opened=True, state=place / "state", kept=store.load()), how)


@pytest.mark.slow
def test_written_answers_leave_no_draft(place: Path) -> None:
    store = drafts.Store(Path("project"), place / "state")

    async def how(pilot: Pilot[list[str]]) -> None:
        await review(pilot)
        assert store.load() is not None
        await pilot.press("ctrl+s")
        await until(pilot, lambda: isinstance(pilot.app.screen, DoneScreen))
        assert store.load() is None

    drive(app_of(VALUES, state=place / "state"), how)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[", "[]", "{}", '{"version": 2}', '{"version": 1, "values": 3}'),
        '{"version": 1, "directory": "p", "values": {}, "typed": {"no.field": ""}, "computed": []}',
    ],
)
def test_a_draft_that_cannot_be_read_is_none(place: Path, text: str) -> None:
    store = drafts.Store(Path("project"), place / "state")
    store.save(Draft(VALUES), "project")
    (file,) = (place / "state/drafts").iterdir()
    file.write_text(text)
    assert store.load() is None


def test_drafts_are_of_one_project_each(place: Path) -> None:
    one = drafts.Store(Path("one"), place / "state")
    one.save(Draft(VALUES), "one")
    assert drafts.Store(Path("two"), place / "state").load() is None
    assert one.of(Path("two")).load() is None
    assert drafts.Store(Path("x/../one"), place / "state").load() is not None
    (file,) = (place / "state/drafts").iterdir()
    assert set(json.loads(file.read_text())) == {
        *("version", "directory", "values", "typed", "computed")
    }


def test_where_a_draft_cannot_be_kept_the_wizard_goes_on(place: Path) -> None:
    (place / "state").write_text("a file is in the way")
    store = drafts.Store(Path("project"), place / "state")
    store.save(Draft(VALUES), "project")
    assert store.load() is None


@pytest.mark.parametrize("base", ["relative", ""])
def test_state_directory(monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", base)
    assert drafts.state_directory() == Path.home() / ".local/state/ms4"
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert drafts.state_directory() == Path("/state/ms4")


# Merging what was edited.


@pytest.mark.parametrize(
    ("edited", "new", "merged"),
    [
        ("a\nb\nc\n", "a\nB\nc\n", "a\nB\nc\n"),
        ("mine\na\nb\nc\n", "a\nb\nC\n", "mine\na\nb\nC\n"),
        ("a\nb\nc\nend", "A\nb\nc\n", "A\nb\nc\nend"),
        ("a\nX\nc\n", "a\nB\nc\n", None),
        ("a\nB\nc\n", "a\nB\nc\n", "a\nB\nc\n"),
        ("a\nx\nb\nc\n", "a\ny\nb\nc\n", None),
        ("c\n", "a\nb\nC\n", "C\n"),
        ("a\nb\nc\n", "", ""),
    ],
)
def test_merge(edited: str, new: str, merged: str | None) -> None:
    assert merge.merge("a\nb\nc\n", edited, new) == merged
