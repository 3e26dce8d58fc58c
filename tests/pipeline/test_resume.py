"""`ms4 resume` after real kills: a small Snakemake project whose one stage holds a real lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ms4 import lock
from tests.commands import run, wait_for
from tests.toy import runs

pytestmark = pytest.mark.slow

Start = Callable[..., "subprocess.Popen[str]"]


def start_snakemake(start: Start, root: Path) -> subprocess.Popen[str]:
    """Snakemake in the middle of its stage."""
    process = start(
        sys.executable, "-m", "snakemake", "--profile", "local", cwd=root, log=root / "first.out"
    )
    wait_for(lambda: runs(root) and lock.live_owners(root), "the stage")
    return process


def kill(process: subprocess.Popen[str]) -> None:
    """Kill Snakemake, and nothing that it started."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def start_resume(start: Start, root: Path) -> tuple[subprocess.Popen[str], Path]:
    log = root / "resume.out"
    return start(sys.executable, "-m", "ms4", "resume", root, cwd=root.parent, log=log), log


def test_waits_for_the_orphan_then_goes_on(toy: Path, start: Start) -> None:
    kill(start_snakemake(start, toy))
    (owner,) = lock.live_owners(toy)
    assert psutil.pid_exists(owner.pid)

    process, log = start_resume(start, toy)
    wait_for(lambda: "waiting for" in log.read_text(), "resume to wait")
    assert f"waiting for `ms4 train` (process {owner.pid} on {owner.host}" in log.read_text()
    assert len(runs(toy)) == 1, "a second stage was started beside the orphan"
    (toy / "go").touch()

    assert process.wait(120) == 0, log.read_text()
    text = log.read_text()
    assert "Snakemake was killed and left its lock; removing it." in text
    assert (toy / "results/train.json").read_text() == '{"stage": "train"}'
    lines = runs(toy)
    assert [line.split()[0] for line in lines] == ["begin", "end"] * (len(lines) // 2)
    assert lines[:2] == [f"begin {owner.pid}", f"end {owner.pid}"]
    assert lock.live_owners(toy) == []


def test_second_stage_beside_the_orphan_is_refused_without_resume(toy: Path, start: Start) -> None:
    """What happens to one who unlocks by hand: the stage's own lock stops the second writer."""
    kill(start_snakemake(start, toy))
    snakemake = (sys.executable, "-m", "snakemake", "--profile", "local")
    locked = run(*snakemake, cwd=toy)
    assert locked.returncode == 1
    assert "LockException" in locked.stdout
    assert run(*snakemake, "--unlock", cwd=toy).returncode == 0
    again = run(*snakemake, cwd=toy)
    assert again.returncode == 1
    assert "two writers would destroy each other's files. Run `ms4 resume " in again.stdout
    assert len(runs(toy)) == 1


def test_goes_on_at_once_when_the_stage_died_too(toy: Path, start: Start) -> None:
    process = start_snakemake(start, toy)
    stages = psutil.Process(process.pid).children(recursive=True)
    kill(process)
    for stage in stages:
        stage.kill()
    (toy / "go").touch()
    answer = run(sys.executable, "-m", "ms4", "resume", cwd=toy)  # the directory it is called in
    assert answer.returncode == 0, answer.stdout
    assert "removing it" in answer.stdout
    assert [line.split()[0] for line in runs(toy)] == ["begin", "begin", "end"]


def test_a_finished_project_has_nothing_to_do(toy: Path) -> None:
    (toy / "go").touch()
    command = (sys.executable, "-m", "ms4", "resume", toy, "--profile", "local")
    assert run(*command, cwd=toy.parent).returncode == 0
    answer = run(*command, cwd=toy.parent)
    assert answer.returncode == 0
    assert "Nothing to be done" in answer.stdout
    assert "waiting" not in answer.stdout
    assert "removing" not in answer.stdout


def test_exit_code_is_snakemakes(toy: Path) -> None:
    (toy / "stage.py").write_text("raise SystemExit(3)")
    answer = run(sys.executable, "-m", "ms4", "resume", toy, cwd=toy.parent)
    assert answer.returncode == 1
    assert "Error in rule train" in answer.stdout
    answer = run(sys.executable, "-m", "ms4", "resume", toy, "--profile", "nowhere", cwd=toy)
    assert answer.returncode == 1
    assert "nowhere" in answer.stdout


def test_refuses_beside_a_live_snakemake(toy: Path, start: Start) -> None:
    process = start_snakemake(start, toy)
    answer = run(sys.executable, "-m", "ms4", "resume", toy, cwd=toy.parent)
    assert answer.returncode == 2
    assert f"ms4 resume: Snakemake runs in {toy} (process {process.pid})" in answer.stdout
    assert process.poll() is None
    (toy / "go").touch()
    assert process.wait(60) == 0


def test_refuses_what_is_no_project(tmp_path: Path) -> None:
    answer = run(sys.executable, "-m", "ms4", "resume", tmp_path, cwd=tmp_path)
    assert answer.returncode == 2
    assert answer.stdout.startswith(f"ms4 resume: {tmp_path}: not a project, it has no Snakefile.")
    (tmp_path / "Snakefile").touch()
    answer = run(sys.executable, "-m", "ms4", "resume", tmp_path, cwd=tmp_path)
    assert answer.returncode == 2
    assert "it has no config/config.yaml" in answer.stdout


def test_ctrl_c_leaves_the_orphan_running(toy: Path, start: Start) -> None:
    kill(start_snakemake(start, toy))
    (owner,) = lock.live_owners(toy)
    process, log = start_resume(start, toy)
    wait_for(lambda: "waiting for" in log.read_text(), "resume to wait")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert f"left running: `ms4 train` (process {owner.pid} on" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert [left.pid for left in lock.live_owners(toy)] == [owner.pid]


def test_signals_reach_snakemake(toy: Path, start: Start) -> None:
    """Resume becomes Snakemake. Ctrl-C, which the terminal sends to all, leaves no lock."""
    process, log = start_resume(start, toy)
    wait_for(lambda: runs(toy), "the stage")
    assert "-m snakemake --profile local" in " ".join(psutil.Process(process.pid).cmdline())
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) != 0
    wait_for(lambda: not lock.live_owners(toy), "the stage to end")
    assert not list(toy.glob(".snakemake/locks/*")), log.read_text()


def test_an_owner_on_another_host_is_waited_for(toy: Path, start: Start) -> None:
    """A shared file system: its heartbeat is all that is seen of it."""
    (toy / "locks").mkdir()
    owner = toy / "locks/train.owner"
    owner.write_text(
        '{"stage": "train", "host": "node7", "pid": 1, "started": 0, "slurm_job": "42"}'
    )
    (toy / "go").touch()
    process, log = start_resume(start, toy)
    wait_for(lambda: "waiting for" in log.read_text(), "resume to wait")
    assert "waiting for `ms4 train` (process 1 on node7, Slurm job 42)" in log.read_text()
    old = time.time() - lock.STALE_S * 2
    os.utime(owner, (old, old))
    assert process.wait(60) == 0, log.read_text()


def test_a_stage_without_its_lock_yet_is_waited_for(toy: Path, start: Start) -> None:
    """Between a kill and the lock lies the start of Python: the command line is what is seen."""
    command = "while [ ! -e go ]; do sleep 0.1; done  # ms4 train --config config/config.yaml"
    orphan = start("bash", "-c", command, cwd=toy)
    process, log = start_resume(start, toy)
    wait_for(lambda: "waiting for" in log.read_text(), "resume to wait")
    assert f"waiting for process {orphan.pid}" in log.read_text()
    (toy / "go").touch()
    assert process.wait(60) == 0, log.read_text()


def test_on_a_terminal_one_line_is_rewritten(toy: Path, start: Start) -> None:
    """`script` gives it a real pseudo-terminal."""
    kill(start_snakemake(start, toy))
    log = toy / "terminal.out"
    command = f"{sys.executable} -m ms4 resume {toy}"
    process = start(
        *("script", "--quiet", "--return", "--flush", "--command", command, "/dev/null"),
        cwd=toy.parent,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "200"},
        log=log,
    )
    wait_for(lambda: "waiting for" in log.read_text(errors="replace"), "resume to wait")
    (toy / "go").touch()
    assert process.wait(60) == 0, log.read_text(errors="replace")
    text = log.read_text(errors="replace")
    assert "\x1b[2K" in text, "the status line was not taken away"
    assert "It has ended." in text
