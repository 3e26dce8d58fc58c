"""A command whose output goes to a program that ends before it, as `| head` does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ms4 import config
from ms4.cli import main

pytestmark = pytest.mark.slow


def piped(command: str, reader: str, directory: Path) -> tuple[int, str]:
    """Exit code of `COMMAND | READER`, and what it says on standard error."""
    line = f"{sys.executable} -m {command} | {reader}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=directory, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", ["ms4 plan --json", "ms4 schema", "ms4_wizard --print-schema"])
def test_a_reader_that_leaves_ends_it_quietly(command: str, tmp_path: Path) -> None:
    """Also if the little that there is to write waits in a buffer until the end."""
    assert piped(command, "true", tmp_path) == (141, "")


def test_a_reader_that_leaves_the_help(tmp_path: Path) -> None:
    code, told = piped("ms4 --help", "true", tmp_path)
    assert code in (0, 141)  # unbuffered, argparse itself meets the pipe, and passes over it
    assert told == ""


def test_a_reader_that_leaves_the_faults_of_data(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n" * 3000)
    code, told = piped("ms4 data --json a.jsonl", "head -c 300", tmp_path)
    assert code in (2, 141)  # all may be written before `head` ends
    assert "Traceback" not in told
    assert "BrokenPipe" not in told


def test_standard_error_without_a_reader(tmp_path: Path) -> None:
    assert piped("ms4 plan --config no.yaml 2>&1", "true", tmp_path) == (141, "")


def test_a_reader_that_stays_gets_all(tmp_path: Path) -> None:
    line = f"{sys.executable} -m ms4 plan --json"
    done = subprocess.run(
        ["bash", "-c", f"{line} | cat"], cwd=tmp_path, capture_output=True, check=True
    )
    assert json.loads(done.stdout)


@pytest.mark.parametrize("command", ["ms4 plan --json", "ms4 schema", "ms4_wizard --print-schema"])
def test_a_full_disk_is_told_in_a_line(command: str, tmp_path: Path) -> None:
    line = f"{sys.executable} -m {command}"
    told = subprocess.run(
        ["bash", "-c", f"{line} >/dev/full"], cwd=tmp_path, capture_output=True, text=True
    )
    assert told.returncode == 2
    assert told.stderr.splitlines() == [
        "standard output, or a file, cannot be written (No space left on device); make room and "
        "run again"
    ]
    closed = subprocess.run(["bash", "-c", f"{line} >&-"], cwd=tmp_path, capture_output=True)
    assert (closed.returncode, closed.stderr) == (0, b"")


def test_a_pipe_of_something_else_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks() -> str:
        raise BrokenPipeError

    monkeypatch.setattr(config, "json_schema", breaks)
    with pytest.raises(BrokenPipeError):
        main(["schema"])
