"""A real terminal: tmux types, looks, and Snakemake takes what was written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands import snakemake, wait_for

pytestmark = pytest.mark.slow

Keys = Callable[..., None]


class Terminal:
    """A tmux session of its own server, 80 × 24."""

    def __init__(self, place: Path) -> None:
        self._tmux = ["tmux", "-S", str(place / "tmux.socket")]
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

    def tab(self) -> None:
        """To the next control. What is typed at once could still reach the one before."""
        before = self._cursor()
        self.press("Tab")
        wait_for(lambda: self._cursor() != before, "the cursor in another control")

    def _cursor(self) -> str:
        return self._run("display-message", "-p", "#{cursor_x},#{cursor_y}")

    def screen(self) -> str:
        return self._run("capture-pane", "-p")

    def wait_for(self, text: str) -> None:
        try:
            wait_for(lambda: text in self.screen(), f"{text!r} on the screen", seconds=60)
        except AssertionError as error:
            raise AssertionError(f"{error}; it shows:\n{self.screen()}") from None

    def end(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], capture_output=True, check=False, timeout=30)


@pytest.fixture
def terminal(place: Path) -> Iterator[Terminal]:
    if shutil.which("tmux") is None:
        assert not os.environ.get("CI"), "CI has a terminal"
        pytest.skip("tmux is not installed")
    opened = Terminal(place)
    yield opened
    opened.end()


def start(terminal: Terminal, arguments: str = "") -> None:
    path = os.environ.get("PYTHONPATH", "")
    terminal.type(f"clear; PYTHONPATH={path} {sys.executable} -m ms4_wizard {arguments}")
    terminal.press("Enter")


def test_screens_to_a_project(place: Path, terminal: Terminal) -> None:
    start(terminal)
    terminal.wait_for("1 of 9")
    terminal.wait_for("at its fullest")  # it has looked at the machine, and listens
    terminal.press("C-u")
    # The key that clears is a binding, as Tab is: what is typed at once could be cleared with it.
    terminal.wait_for("should have at least 1 character")
    terminal.type("tiny")
    terminal.tab()
    terminal.type("train.jsonl")
    terminal.tab()
    terminal.type("held = sets/test.jsonl")
    terminal.press("C-n")
    for number, title in enumerate(
        ("Modality", "Reasoning mode", "Method", "Memory budget", "Expert quantization"), 2
    ):
        terminal.wait_for(f"{number} of 9")
        assert title in terminal.screen()
        assert "at its fullest, GiB" in terminal.screen()
        if title == "Memory budget":
            terminal.press("Down", "Down", "Enter")
            terminal.wait_for("● cpu")
        terminal.press("C-n")
    terminal.wait_for("7 of 9")
    terminal.press("Escape")
    terminal.wait_for("6 of 9")
    terminal.press("C-n")
    terminal.wait_for("7 of 9")
    terminal.press("Down", "Down", "Space")
    terminal.wait_for("☑ experts")
    terminal.press("C-n")
    terminal.wait_for("8 of 9")
    terminal.press("C-n")
    terminal.wait_for("9 of 9")
    terminal.press("C-s")
    terminal.wait_for("The project is in ms4-project. Next:")
    assert "snakemake --profile local" in terminal.screen()
    answer = snakemake("--profile", "local", "-n", cwd=place / "ms4-project")
    assert answer.returncode == 0, answer.stdout
    text = (place / "ms4-project/config/config.yaml").read_text()
    assert "targets: [attention, shared, experts]" in text

    # It opens again, at the review, with these answers; leaving changes nothing.
    start(terminal, "ms4-project")
    terminal.wait_for("9 of 9")
    assert "data.train  train.jsonl" in terminal.screen()
    terminal.press("C-q")
    terminal.wait_for("Nothing was written.")
    assert (place / "ms4-project/config/config.yaml").read_text() == text


def test_something_else_is_refused_before_any_screen(terminal: Terminal) -> None:
    start(terminal, "sets")
    terminal.wait_for("ms4-wizard: sets: holds something that is not an ms4 project.")
