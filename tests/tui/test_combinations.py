"""Every combination that is offered, through the screens: the same bytes as headless, and a project
that Snakemake takes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from ms4_wizard import project, writing
from ms4_wizard.answers import Answers
from ms4_wizard.screens.done import DoneScreen
from ms4_wizard.steps import QUESTIONS
from ms4_wizard.widgets.choices import Choices
from tests.commands import snakemake
from tests.tui.conftest import contents
from tests.tui.driving import answer, app_of, drive, go_to, review, until

FIELDS = ("data.modality", "data.reasoning", "method", "model.experts", "where.run")
ALL = list(itertools.product(*([choice.value for choice in QUESTIONS[f].choices] for f in FIELDS)))
STEPS = ("modality", "reasoning", "method", "memory", "where")
SAMPLE = ALL[:: len(ALL) // 3]
VALUES: dict[str, Any] = {
    "data": {"train": ["train.jsonl"], "test": {"held": "sets/test.jsonl"}},
    "run": {"device": "cuda", "memory_gib": 300},
}


def through_the_screens(wanted: tuple[str, ...]) -> Answers:
    """Write the project `screens` by keys; the answers that it is of."""
    found: list[Answers] = []

    async def how(pilot: Pilot[list[str]]) -> None:
        for step, field, value in zip(STEPS, FIELDS, wanted, strict=True):
            await go_to(pilot, step)
            control = answer(pilot, field).query_one(Choices)
            control.focus()
            await until(pilot, lambda c=control: c.has_focus)
            values = [choice.value for choice in QUESTIONS[field].choices]
            steps = values.index(value) - (control.highlighted or 0)
            await pilot.press(*["down" if steps > 0 else "up"] * abs(steps), "enter")
            await pilot.pause()
        screen = await review(pilot)
        checked, faults = screen.flow.draft.check()
        assert checked is not None, faults
        found.append(checked)
        await pilot.press("ctrl+s")
        await until(pilot, lambda: isinstance(pilot.app.screen, DoneScreen))

    drive(app_of(VALUES, "screens"), how)
    return found[0]


def check(place: Path, wanted: tuple[str, ...]) -> None:
    answers = through_the_screens(wanted)
    assert [answers.data.modality, answers.data.reasoning, answers.method] == list(wanted[:3])
    assert [answers.model.experts, answers.where.run] == list(wanted[3:])
    writing.write_from_answers(answers, Path("headless"))
    assert contents(place / "screens") == contents(place / "headless")
    assert project.read_project(place / "screens") == answers


def check_with_snakemake(place: Path, wanted: tuple[str, ...]) -> None:
    check(place, wanted)
    for options in (["--profile", wanted[-1], "-n"], ["--lint"]):
        done = snakemake(*options, cwd=place / "screens")
        assert done.returncode == 0, done.stdout


def test_all_choices_are_in_it() -> None:
    for number, field in enumerate(FIELDS):
        offered = {choice.value for choice in QUESTIONS[field].choices}
        assert {combination[number] for combination in ALL} == offered
    assert len(ALL) == 2 * 3 * 1 * 3 * 2


@pytest.mark.slow
@pytest.mark.parametrize("wanted", SAMPLE, ids="-".join)
def test_some_combinations(place: Path, wanted: tuple[str, ...]) -> None:
    check(place, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", SAMPLE[1:3], ids="-".join)
def test_snakemake_takes_some(place: Path, wanted: tuple[str, ...]) -> None:
    check_with_snakemake(place, wanted)


@pytest.mark.soak
@pytest.mark.parametrize("wanted", ALL, ids="-".join)
def test_snakemake_takes_each(place: Path, wanted: tuple[str, ...]) -> None:
    check_with_snakemake(place, wanted)
