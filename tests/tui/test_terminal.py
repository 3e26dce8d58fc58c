"""A real terminal: tmux types, looks, and Snakemake takes what was written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ms4_wizard import writing
from ms4_wizard.answers import Answers
from tests.commands import snakemake, wait_for
from tests.tui.runs import processes_in

pytestmark = pytest.mark.slow

Keys = Callable[..., None]


class Terminal:
    """A tmux session of its own server, 80 × 24."""

    def __init__(self, place: Path) -> None:
        number = len(list(place.glob("tmux.*")))  # one that was just ended may still be there
        self._tmux = ["tmux", "-S", str(place / f"tmux.{number}")]
        self._run("-f", os.devnull, "new-session", "-d", "-x", "80", "-y", "24", "-c", str(place))

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self._tmux, *arguments], capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout

    def type(self, text: str) -> None:
        self._run("send-keys", "-l", text)

    def press(self, *keys: str) -> None:
        for key in keys:
            self._run("send-keys", key)

    def screen(self) -> str:
        return self._run("capture-pane", "-p")

    def wait_for(self, text: str, seconds: float = 60) -> None:
        try:
            wait_for(lambda: text in self.screen(), f"{text!r} on the screen", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; it shows:\n{self.screen()}") from None

    def end(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], capture_output=True, check=False, timeout=30)


@contextmanager
def opened(place: Path) -> Iterator[Terminal]:
    terminal = Terminal(place)
    try:
        yield terminal
    finally:
        terminal.end()


@pytest.fixture
def terminal(place: Path) -> Iterator[Terminal]:
    if shutil.which("tmux") is None:
        assert not os.environ.get("CI"), "CI has a terminal"
        pytest.skip("tmux is not installed")
    with opened(place) as terminal:
        yield terminal
    for process in processes_in(place / "ms4-project"):
        process.kill()  # what a test that failed left running


def start(terminal: Terminal, arguments: str = "") -> None:
    path = os.environ.get("PYTHONPATH", "")
    terminal.type(f"clear; PYTHONPATH={path} {sys.executable} -m ms4_wizard {arguments}")
    terminal.press("Enter")


def test_from_the_first_screen_to_a_finished_run(
    place: Path, terminal: Terminal, checkpoint: Path
) -> None:
    for name in ("train.jsonl", "sets/test.jsonl"):
        lines = [conversation(f"{name} {number}") for number in range(4)]
        (place / name).write_text("".join(lines))
    start(terminal)
    terminal.wait_for("New project")
    terminal.press("Enter")
    terminal.wait_for("1 of 11")
    terminal.wait_for("at its fullest")  # it has looked at the machine, and listens
    terminal.press("Down", "Down", "Enter")
    terminal.wait_for("● cpu")
    terminal.press("C-n")
    terminal.wait_for("2 of 11")
    terminal.type("train.jsonl")
    terminal.wait_for("train.jsonl")
    terminal.press("C-n")
    for number, title in ((3, "Modality"), (4, "Reasoning mode")):
        terminal.wait_for(f"{number} of 11")
        assert title in terminal.screen()
        terminal.press("C-n")
    terminal.wait_for("5 of 11")
    terminal.press("C-u")
    # The key that clears is a binding, as Tab is: what is typed at once could be cleared with it.
    terminal.wait_for("should have at least 1 character")
    terminal.type(str(checkpoint))
    terminal.press("C-n")
    for number in (6, 7):
        terminal.wait_for(f"{number} of 11")
        terminal.press("C-n")
    terminal.wait_for("8 of 11")
    terminal.press("Escape")
    terminal.wait_for("7 of 11")
    terminal.press("C-n")
    terminal.wait_for("8 of 11")
    terminal.press("C-n")
    terminal.wait_for("9 of 11")
    terminal.press("C-n")
    terminal.wait_for("10 of 11")
    terminal.type("held = sets/test.jsonl")
    terminal.press("C-n")
    terminal.wait_for("11 of 11")
    terminal.press("C-s")
    terminal.wait_for("The project is in")
    answer = snakemake("--profile", "local", "-n", cwd=place / "ms4-project")
    assert answer.returncode == 0, answer.stdout

    # Run it now; the terminal is closed in the middle, and the run goes on.
    terminal.press("r")
    terminal.wait_for("▶ ")
    terminal.end()
    with opened(place) as other:
        start(other, "watch ms4-project")
        other.wait_for("ms4  ·  ms4-project")
        other.wait_for("finished", seconds=400)
        assert "✓ deliver" in other.screen()
        assert "training: step" in other.screen()
        other.press("q")
        other.wait_for("The run in ms4-project: finished.")
        manifest = json.loads((place / "ms4-project/results/deliver.json").read_text())
        assert manifest["stage"] == "deliver"

        # It opens again, at the review, with these answers; leaving changes nothing.
        text = (place / "ms4-project/config/config.yaml").read_text()
        start(other, "ms4-project")
        other.wait_for("11 of 11")
        assert "train.jsonl" in other.screen()
        other.press("C-q")
        other.wait_for("Nothing was written.")
        assert (place / "ms4-project/config/config.yaml").read_text() == text


def test_a_closed_terminal_loses_nothing(place: Path, terminal: Terminal) -> None:
    """Not even a line that was typed half, over a project that says the rest."""
    values = {"data": {"train": ["train.jsonl"]}, "model": {"source": "tiny"}}
    writing.write_from_answers(Answers.model_validate(values), Path("p"))
    state = f"XDG_STATE_HOME={place / 'state'}"
    terminal.type(f"export {state}\n")
    start(terminal, "p")
    terminal.wait_for("11 of 11")
    terminal.wait_for("at its fullest")
    terminal.press("Escape")
    terminal.wait_for("10 of 11")
    terminal.type("half a li")
    terminal.wait_for("half a li")
    terminal.end()
    with opened(place) as other:
        other.type(f"export {state}\n")
        start(other, "p")
        other.wait_for("Go on with the draft")
        other.press("Enter")
        other.wait_for("11 of 11")
        other.press("Escape")
        other.wait_for("half a li")


def conversation(words: str) -> str:
    turns = [{"role": "user", "content": words}, {"role": "assistant", "content": words[::-1]}]
    return json.dumps({"messages": turns}) + "\n"


def test_something_else_is_refused_before_any_screen(terminal: Terminal) -> None:
    start(terminal, "sets")
    terminal.wait_for("ms4-wizard: sets: holds something that is not an ms4 project.")
