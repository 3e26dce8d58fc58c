"""The review: answers changed in place, files and their differences, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, OptionList

from ms4 import lock
from ms4.errors import Ms4Error
from ms4_wizard import project, writing
from ms4_wizard.answers import Answers
from ms4_wizard.draft import Draft
from ms4_wizard.screens.diff import DiffScreen
from ms4_wizard.screens.done import DoneScreen
from ms4_wizard.screens.edit import EditScreen
from ms4_wizard.screens.review import ReviewScreen
from tests.tui.driving import VALUES, app_of, drive, plan, review, screen_text, shown, until

pytestmark = pytest.mark.slow


async def mark(pilot: Pilot[list[str]], field: str) -> None:
    """Choose an answer in the review's list, by keys."""
    options = pilot.app.screen.query_one("#answers", OptionList)
    options.focus()
    ids = [option.id for option in options.options]
    options.highlighted = ids.index(field.replace(".", "-"))
    await pilot.press("enter")
    await until(pilot, lambda: isinstance(pilot.app.screen, EditScreen))


def listed(pilot: Pilot[list[str]]) -> str:
    options = pilot.app.screen.query_one("#answers", OptionList).options
    return "\n".join(str(option.prompt) for option in options)


def test_answers_are_changed_in_place(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await review(pilot)
        before = plan(pilot)
        await mark(pilot, "adapters.rank")
        await pilot.press("ctrl+u", *"x")
        await pilot.pause()
        assert "whole number" in shown(pilot)
        await pilot.press("backspace", *"64", "enter")
        await until(pilot, lambda: isinstance(pilot.app.screen, ReviewScreen))
        assert "Rank  64" in listed(pilot)
        assert plan(pilot) != before
        # What a choice opens or closes is asked then.
        assert "Slurm partition" not in listed(pilot)
        await mark(pilot, "where.run")
        await pilot.press("down", "enter", "escape")
        await until(pilot, lambda: isinstance(pilot.app.screen, ReviewScreen))
        assert "Slurm partition" in listed(pilot)

    drive(app_of(VALUES), how)


def test_what_does_not_fit_is_refused_and_mended_by_a_key(place: Path) -> None:
    values = {**VALUES, "train": {"loss_chunk": 16384, "micro_batch": 8, "checkpointing": "none"}}

    async def how(pilot: Pilot[list[str]]) -> None:
        screen = await review(pilot)
        assert "does not fit" in plan(pilot)
        await pilot.press("ctrl+s")
        await pilot.pause()
        assert "the run does not fit: it needs" in shown(pilot)
        assert not (place / "project").exists()
        fault = screen.query_one("#fault")
        assert screen.region.contains_region(fault.region), "in sight at 80 x 24"
        await until(pilot, lambda: "Ctrl+F" in plan(pilot))
        await pilot.press("ctrl+f")
        await until(pilot, lambda: "does not fit" not in plan(pilot))
        await pilot.press("ctrl+s")
        await until(pilot, lambda: isinstance(pilot.app.screen, DoneScreen))

    drive(app_of(values), how)
    assert (place / "project/Snakefile").is_file()


def test_wrong_answers_are_named(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        assert "Trained: `full` does not run" in shown(pilot)
        await pilot.press("ctrl+s")
        assert "Trained: `full` does not run" in shown(pilot)

    drive(app_of({**VALUES, "method": "full"}, opened=True), how)


def test_a_directory_is_needed(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        line = pilot.app.screen.query_one("#directory", Input)
        line.value = " "
        await pilot.pause()
        await pilot.press("ctrl+s")
        await pilot.pause()
        assert shown(pilot) == "Give the project a directory."
        line.value = "sets"
        await pilot.pause()
        await pilot.press("ctrl+s")
        await pilot.pause()
        assert "sets: holds something that is not an ms4 project" in shown(pilot)
        line.value = "n" * 300
        await pilot.pause()
        await pilot.press("ctrl+s")
        await pilot.pause()
        assert "cannot be used (File name too long)" in shown(pilot)
        line.value = "fresh"
        await pilot.pause()
        await pilot.press("ctrl+s")
        await until(pilot, lambda: isinstance(pilot.app.screen, DoneScreen))

    drive(app_of(VALUES, opened=True), how)
    assert (place / "fresh/Snakefile").is_file()


def test_nothing_is_written_while_a_stage_is_at_work(place: Path, answers: Answers) -> None:
    writing.write_from_answers(answers, Path("project"))
    before = Path("project/config/config.yaml").read_bytes()
    other = answers.model_copy(update={"seed": 7})
    with lock.hold("train", Path("project/locks")):
        with pytest.raises(Ms4Error, match=r"project: `ms4 train` \(process .* is at work there"):
            writing.write_from_answers(other, Path("project"))
        assert Path("project/config/config.yaml").read_bytes() == before
        writing.write_from_answers(answers, Path("project"))  # it changes nothing
        assert writing.write_from_answers(other, Path("project"), dry_run=True)
    writing.write_from_answers(other, Path("project"))
    assert Path("project/config/config.yaml").read_bytes() != before


def test_a_new_projects_files_are_listed(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await review(pilot)
        await pilot.press("ctrl+d")
        await until(pilot, lambda: isinstance(pilot.app.screen, DiffScreen))
        text = screen_text(pilot)
        assert "+ config/config.yaml" in text
        assert "+ rules/train.smk" in text
        await pilot.press("ctrl+s")  # it only shows
        await pilot.press("escape")
        await pilot.pause()
        assert isinstance(pilot.app.screen, ReviewScreen)

    drive(app_of(VALUES), how, (140, 45))
    assert not (place / "project").exists()


def test_project_that_exists_shows_its_differences_and_asks(place: Path, answers: Answers) -> None:
    writing.write_from_answers(answers, Path("project"))
    file = place / "project/config/config.yaml"
    file.write_text(file.read_text() + "# mine\n")
    rules = place / "project/rules/train.smk"
    rules.write_text(rules.read_text() + "# mine, too\n")
    read = project.read_project(Path("project"))

    async def how(pilot: Pilot[list[str]]) -> None:
        assert "Training data  train.jsonl" in listed(pilot)
        assert "Slurm account  007" in listed(pilot)
        pilot.app.screen.flow.draft.set("adapters.rank", 5)  # type: ignore[attr-defined]
        before = file.read_text()
        await pilot.press("ctrl+s")
        await until(pilot, lambda: isinstance(pilot.app.screen, DiffScreen))
        text = screen_text(pilot)
        assert "& config/config.yaml" in text
        assert "= rules/train.smk  kept as you edited it" in text
        assert "-  rank: 8" in text
        assert "+  rank: 5" in text
        await pilot.press("escape")
        await pilot.pause()
        assert file.read_text() == before, "nothing is written without a yes"
        await pilot.press("ctrl+s")
        await until(pilot, lambda: isinstance(pilot.app.screen, DiffScreen))
        await pilot.press("ctrl+s")
        await until(pilot, lambda: isinstance(pilot.app.screen, DoneScreen))
        await pilot.press("enter")

    told = drive(app_of(Draft.of(read).values, opened=True), how, (140, 45))
    assert told is not None
    assert "rank: 5" in file.read_text()
    assert file.read_text().endswith("# mine\n")
    assert rules.read_text().endswith("# mine, too\n")


def test_edits_in_the_same_lines_are_kept_beside(place: Path, answers: Answers) -> None:
    writing.write_from_answers(answers, Path("project"))
    file = place / "project/config/config.yaml"
    file.write_text(file.read_text().replace("  rank: 8", "  rank: 8  # mine"))

    async def how(pilot: Pilot[list[str]]) -> None:
        pilot.app.screen.flow.draft.set("adapters.rank", 5)  # type: ignore[attr-defined]
        await pilot.press("ctrl+s")
        await until(pilot, lambda: isinstance(pilot.app.screen, DiffScreen))
        assert "! config/config.yaml  replaced" in screen_text(pilot)
        assert "Replace and write" in screen_text(pilot)
        await pilot.click("#write")
        await until(pilot, lambda: isinstance(pilot.app.screen, DoneScreen))

    values = Draft.of(project.read_project(Path("project"))).values
    drive(app_of(values, opened=True), how, (140, 45))
    assert "rank: 5" in file.read_text()
    assert "# mine" in file.with_name("config.yaml.bak").read_text()


@pytest.mark.parametrize("note", ["[]", "{"])
def test_a_directory_with_a_damaged_note(place: Path, answers: Answers, note: str) -> None:
    writing.write_from_answers(answers, Path("broken"))
    (place / "broken/config/project.json").write_text(note)

    async def how(pilot: Pilot[list[str]]) -> None:
        pilot.app.screen.query_one("#directory", Input).value = "broken"
        await pilot.pause()
        await pilot.press("ctrl+s")
        await pilot.pause()
        assert "not the note that the wizard wrote" in shown(pilot)

    drive(app_of(VALUES, opened=True), how)


def test_another_project_is_not_replaced_without_a_word(place: Path, answers: Answers) -> None:
    writing.write_from_answers(answers, Path("project"))

    async def how(pilot: Pilot[list[str]]) -> None:
        await review(pilot)
        await pilot.press("ctrl+s")
        await until(pilot, lambda: isinstance(pilot.app.screen, DiffScreen))
        assert "another project" in screen_text(pilot)
        await pilot.press("ctrl+s")
        await until(pilot, lambda: isinstance(pilot.app.screen, DoneScreen))

    drive(app_of(VALUES), how)
    assert project.read_project(place / "project").run.device == "cuda"


def test_after_done_answers_can_be_changed_again(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await review(pilot)
        await pilot.press("ctrl+s")
        await until(pilot, lambda: isinstance(pilot.app.screen, DoneScreen))
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(pilot.app.screen, ReviewScreen))
        await mark(pilot, "adapters.alpha")
        await pilot.press("ctrl+u", *"16", "enter")
        await until(pilot, lambda: isinstance(pilot.app.screen, ReviewScreen))
        await pilot.press("ctrl+s")
        await until(pilot, lambda: isinstance(pilot.app.screen, DiffScreen))
        assert "another project" not in screen_text(pilot)
        await pilot.press("ctrl+s")
        await until(pilot, lambda: isinstance(pilot.app.screen, DoneScreen))
        await pilot.press("enter")

    assert drive(app_of(VALUES), how) is not None
    assert project.read_project(place / "project").adapters.alpha == 16
