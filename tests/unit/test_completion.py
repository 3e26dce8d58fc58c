"""Completion, asked of the shells themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ms4.config import STAGES
from tests.commands import CHECKOUT, run

# Prints what bash would offer for the words given, the last being the one that is typed.
ASK_BASH = """
eval "$(cat "$1")"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
function=$(complete -p "$1" | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
compopt() { :; }
"$function"
printf '%s\\n' "${COMPREPLY[@]}"
"""
# The same of zsh: a terminal of its own, in which a Tab is pressed.
ASK_ZSH = """
zmodload zsh/zpty
zpty -b shell zsh -f -i
drink() { local text; while zpty -r -t shell text; do print -rn -- "$text"; done }
zpty -w shell "autoload -Uz compinit && compinit -D -u; LISTMAX=10000; setopt no_beep; \
zstyle ':completion:*' list-prompt ''; zstyle ':completion:*' menu no; stty columns 200 rows 400; \
PROMPT='>'; source ${(q)1}; print RE''ADY"
for i in {1..300}; do seen+=$(drink); [[ $seen == *READY* ]] && break; sleep 0.05; done
zpty -w -n shell "$2"$'\\t\\t'
for i in {1..30}; do out+=$(drink); sleep 0.05; done
print -r -- "$out"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("completion")
    for module, program in (("ms4", "ms4"), ("ms4_wizard", "ms4-wizard")):
        for shell in ("bash", "zsh", "fish"):
            done = run(*(sys.executable, "-m", module, "--print-completion", shell), cwd=CHECKOUT)
            assert done.returncode == 0, done.stdout
            (directory / f"{program}.{shell}").write_text(done.stdout)
    return directory


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "my project").mkdir()
    (tmp_path / "answers.yaml").touch()
    return tmp_path


def need(shell: str) -> None:
    if shutil.which(shell) is None:
        assert not os.environ.get("CI"), f"CI has {shell}"
        pytest.skip(f"{shell} is not installed")


def bash(scripts: Path, place: Path, *words: str) -> set[str]:
    program = words[0]
    done = subprocess.run(
        ["bash", "-c", ASK_BASH, "ask", str(scripts / f"{program}.bash"), *words],
        capture_output=True,
        text=True,
        cwd=place,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return set(done.stdout.splitlines()) - {""}


def test_bash_commands(scripts: Path, place: Path) -> None:
    found = bash(scripts, place, "ms4", "")
    assert found == {*STAGES, "data", "resume", "summary", "schema"}
    assert bash(scripts, place, "ms4", "de") == {"descale", "deliver"}
    assert "--version" in bash(scripts, place, "ms4", "--")


def test_bash_options_and_values(scripts: Path, place: Path) -> None:
    assert bash(scripts, place, "ms4", "descale", "--s") == {"--softmax-scale"}
    assert bash(scripts, place, "ms4", "descale", "--to", "") == {"bf16", "nf4", "fp8"}
    assert bash(scripts, place, "ms4", "descale", "--to", "=", "n") == {"nf4"}
    assert bash(scripts, place, "ms4", "fetch", "--to", "") == {"my project"}
    keys = bash(scripts, place, "ms4", "plan", "--set", "adapters.")
    assert {"adapters.rank=", "adapters.targets="} <= keys
    assert "data.test=" in bash(scripts, place, "ms4", "plan", "--set", "data")
    assert bash(scripts, place, "ms4", "plan", "--budget", "") == set()


def test_bash_files(scripts: Path, place: Path) -> None:
    assert bash(scripts, place, "ms4", "train", "--config", "") == {"my project", "answers.yaml"}
    assert bash(scripts, place, "ms4-wizard", "--answers", "an") == {"answers.yaml"}
    assert bash(scripts, place, "ms4-wizard", "") == {"watch", "my project"}
    assert bash(scripts, place, "ms4-wizard", "watch", "") == {"my project"}
    assert bash(scripts, place, "ms4-wizard", "watch", "--p") == {"--profile"}
    assert "where.partition=" in bash(scripts, place, "ms4-wizard", "--set", "where")


@pytest.mark.slow
def test_a_tab_in_bash(scripts: Path, place: Path) -> None:
    """Typed into an interactive bash: readline itself, with names that hold spaces."""
    import pty

    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "PS1": "> ", "INPUTRC": os.devnull}
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=place,
        env=environment,
        start_new_session=True,
    )
    os.close(follower)
    lines = (
        f"source {scripts}/ms4-wizard.bash; source {scripts}/ms4.bash",
        'ms4() { printf \'<%s>\' "$@"; echo; }; ms4-wizard() { ms4 "$@"; }',
        "ms4 desc\t--to nf\t",
        "ms4-wizard watch my\t",
        "ms4 plan --set adapters.ra\t16",
        "exit",
    )
    try:
        os.write(leader, "".join(f"{line}\n" for line in lines).encode())
        seen = b""
        while True:
            try:
                got = os.read(leader, 65536)
            except OSError:  # the shell ended
                break
            if not got:
                break
            seen += got
    finally:
        shell.wait(30)
        os.close(leader)
    text = seen.decode(errors="replace")
    assert "<descale><--to><nf4>" in text, text
    assert "<watch><my project/>" in text, text
    assert "<plan><--set><adapters.rank=16>" in text, text


def fish(scripts: Path, place: Path, line: str) -> set[str]:
    program = line.split(" ")[0]
    command = f"source {scripts}/{program}.fish; complete --do-complete '{line}'"
    home = {**os.environ, "HOME": str(place), "XDG_CONFIG_HOME": str(place / ".config")}
    done = subprocess.run(
        ["fish", "--no-config", "-c", command],
        capture_output=True,
        text=True,
        cwd=place,
        env=home,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return {word.split("\t")[0] for word in done.stdout.splitlines()}


def test_fish(scripts: Path, place: Path) -> None:
    need("fish")
    assert fish(scripts, place, "ms4 de") == {"descale", "deliver"}
    assert fish(scripts, place, "ms4 descale --to ") == {"bf16", "nf4", "fp8"}
    assert "adapters.rank=" in fish(scripts, place, "ms4 plan --set adapters.r")
    assert fish(scripts, place, "ms4 descale --soft") == {"--softmax-scale"}
    assert "answers.yaml" in fish(scripts, place, "ms4-wizard --answers an")
    assert "my project/" in fish(scripts, place, "ms4-wizard watch ")
    assert "watch" in fish(scripts, place, "ms4-wizard w")


def zsh(scripts: Path, place: Path, line: str) -> str:
    program = line.split(" ")[0]
    done = subprocess.run(
        ["zsh", "-f", "-c", ASK_ZSH, "ask", str(scripts / f"{program}.zsh"), line],
        capture_output=True,
        text=True,
        cwd=place,
        timeout=60,
        check=False,
        env={**os.environ, "TERM": "dumb", "HOME": str(place)},
    )
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ms4 de", ("descale", "deliver")),
        ("ms4 descale --to ", ("bf16", "fp8", "nf4")),
        ("ms4 descale --soft", ("ms4 descale --softmax-scale",)),
        ("ms4 plan --set adapters.r", ("adapters.rank", "adapters.rslora")),
        ("ms4-wizard --answers an", ("answers.yaml",)),
        ("ms4-wizard watch m", ("my\\ project",)),
        ("ms4-wizard wa", ("ms4-wizard watch",)),
    ],
)
def test_a_tab_in_zsh(scripts: Path, place: Path, line: str, offered: tuple[str, ...]) -> None:
    need("zsh")
    seen = zsh(scripts, place, line)
    for word in offered:
        assert word in seen, seen
    assert "not found" not in seen


@pytest.mark.parametrize("module", ["ms4", "ms4_wizard"])
def test_an_unknown_shell(module: str) -> None:
    done = run(sys.executable, "-m", module, "--print-completion", "tcsh", cwd=CHECKOUT)
    assert done.returncode == 2
    assert "invalid choice: 'tcsh'" in done.stdout
