"""What `make lint` checks, and a few rules of our own."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.commands import CHECKOUT, run

BIN = Path(sys.executable).parent
LONGEST = 500
"""Lines; a longer file needs a reason that one would defend."""


def tracked(*patterns: str) -> list[Path]:
    """Files that git knows, or would with the next `git add`."""
    listing = subprocess.check_output(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=CHECKOUT,
        text=True,
    )
    return [path for name in listing.splitlines() if (path := CHECKOUT / name).is_file()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check"),
        ("ruff", "format", "--check"),
        ("mypy",),
        ("snakefmt", "--check", "Snakefile", "rules"),
        ("snakemake", "--lint"),
    ],
    ids=" ".join,
)
def test_linter(command: tuple[str, ...]) -> None:
    answer = run(BIN / command[0], *command[1:], cwd=CHECKOUT)
    assert answer.returncode == 0, answer.stdout


def test_schema_is_of_these_types() -> None:
    answer = run(sys.executable, "-m", "ms4", "schema", cwd=CHECKOUT)
    committed = (CHECKOUT / "config/schema.json").read_text(encoding="utf-8")
    assert answer.stdout == committed, "run `make generated`"


def test_no_file_is_too_long() -> None:
    sources = tracked("*.py", "*.smk", "Snakefile", "*.sh")
    assert len(sources) > 20
    long = {
        str(path.relative_to(CHECKOUT)): lines
        for path in sources
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST
    }
    assert long == {}


# Put together here, so that this file does not find itself.
FORBIDDEN = ("trust_remote" + "_code", "pick" + "le", "shell" + "=True")


@pytest.mark.parametrize("word", FORBIDDEN)
def test_forbidden_word(word: str) -> None:
    """Code from a model's repository, loading that runs code, and a shell line made of values."""
    sources = tracked("workflow/*", "tui/*", "Snakefile", "rules/*")
    found = [
        f"{path.relative_to(CHECKOUT)}:{number}"
        for path in sources
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if word in line
    ]
    assert found == []


def test_shell_lines_carry_only_the_configurations_path() -> None:
    for path in tracked("rules/*.smk"):
        lines = path.read_text(encoding="utf-8").splitlines()
        for before, line in pairwise(lines):
            if before.strip() == "shell:":
                words = line.strip().strip('"').split()
                assert words[0] == "ms4"
                assert words[2:] == ["--config", "config/config.yaml"]
