"""`ms4 resume DIR`: go on after a kill.

Snakemake that is killed leaves its lock, and its jobs run on: on Slurm always, on one machine as
orphans. Removing the lock and starting again at once would put two writers on the same files.
So: refuse while Snakemake itself lives, wait for what it left behind, unlock, run it.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NoReturn, Protocol

import psutil
import yaml
from rich.console import Console

from ms4 import lock
from ms4.config import STAGES
from ms4.errors import Ms4Error

POLL_S = 1.0
"""Seconds between two looks at the locks and processes of a project."""
POLL_SLURM_S = 10.0
"""The same while Slurm jobs are waited for: each look is a request to the cluster's controller."""
SQUEUE_TIMEOUT_S = 60.0

# The Slurm plugin calls all jobs of a run by one name, a UUID after the profile's prefix.
_RUN_NAME = re.compile(r"([A-Za-z0-9_-]{1,50}_)?[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

# `ms4 train`, `…/bin/ms4 train`, `python -m ms4 train`, alone or in a shell's line
_STAGE_COMMAND = re.compile(rf"(^|[\s/])ms4 ({'|'.join(STAGES)})(\s|$)")


@dataclass(frozen=True)
class SlurmJob:
    """A job of a pipeline in Slurm's queue."""

    number: str
    state: str
    comment: str
    """What the plugin writes there: `rule_STAGE_…`."""

    def __str__(self) -> str:
        rule = self.comment.removeprefix("rule_").split("_wildcards_")[0]
        return f"Slurm job {self.number} ({rule}, {self.state.lower()})"


def _is_snakemake(command: Sequence[str]) -> bool:
    """Whether a command line is `snakemake …`, `python …/snakemake …`, `python -m snakemake …`."""
    return any(
        Path(word).name == "snakemake" and (before in ("", "-m") or "python" in before)
        for before, word in pairwise(("", *command[:4]))
    )


def _is_job(command: Sequence[str]) -> bool:
    """Whether this is one job: a stage, its shell, or the Snakemake that runs it for another."""
    if _is_snakemake(command):
        return any(
            before == "--mode" and word in ("remote", "subprocess")
            for before, word in pairwise(command)
        )
    return _STAGE_COMMAND.search(" ".join(command)) is not None


def _processes(root: Path) -> Iterator[tuple[int, list[str]]]:
    """Process id and command line of what runs in `root` on this host, except what started us."""
    ours = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    for process in psutil.process_iter():
        try:
            if process.pid not in ours and Path(process.cwd()) == root:
                yield process.pid, process.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended, is a zombie, or is another user's


def find_snakemake(root: Path) -> int | None:
    """The process id of the Snakemake that runs in `root` on this host, if one does.

    Args:
        root: the project's directory, resolved.
    """
    for pid, command in _processes(root):
        if _is_snakemake(command) and not _is_job(command):
            return pid
    return None


def find_resume(root: Path) -> int | None:
    """The process id of an `ms4 resume` that was started in `root` and is not Snakemake yet."""
    for pid, command in _processes(root):
        if "ms4 resume" in " ".join([Path(word).name for word in command[:4]]):
            return pid
    return None


def _refuse_beside_snakemake(root: Path) -> None:
    if (pid := find_snakemake(root)) is not None:
        raise Ms4Error(
            f"Snakemake runs in {root} (process {pid}): there is nothing to resume. "
            "Let it go on, or press Ctrl-C where it runs."
        )


def slurm_jobs(root: Path, required: bool) -> list[SlurmJob]:
    """The jobs of pipelines in `root` that Slurm still has to run or runs.

    Raises:
        Ms4Error: `required`, and Slurm does not answer.
    """
    if shutil.which("squeue") is None:
        if required:
            raise Ms4Error("`squeue` is not on PATH: call this on a machine that sees the cluster.")
        return []
    own = os.environ.get("SLURM_JOB_ID")
    command = ["squeue", "--noheader", "--user", getpass.getuser(), "--format", "%A|%j|%T|%Z|%k"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=SQUEUE_TIMEOUT_S, check=True
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        if not required:
            return []  # Slurm's programs without a cluster; nobody asked for one
        reason = str(error.stderr).strip() if error.stderr else str(error)
        raise Ms4Error(
            f"squeue does not answer ({reason}): without it, jobs that still run cannot be seen. "
            "Try again when the cluster's controller is back."
        ) from error
    jobs = []
    for line in answer.stdout.splitlines():
        number, name, state, directory, comment = line.split("|", 4)
        if number != own and _RUN_NAME.fullmatch(name) and Path(directory) == root:
            jobs.append(SlurmJob(number, state, comment))
    return jobs


def _uses_slurm(root: Path, profile: str) -> bool:
    """Whether the profile submits to Slurm."""
    file = root / profile / "config.yaml"
    if not file.is_file():
        return False  # Snakemake will look for it elsewhere, or say that there is none
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    return isinstance(settings, dict) and settings.get("executor") == "slurm"


def _at_work(root: Path, slurm: bool) -> tuple[list[str], float]:
    """What still runs in `root`, each in words, and how long to wait before looking again."""
    jobs = slurm_jobs(root, slurm)
    found = [str(owner) for owner in lock.live_owners(root)]
    found += [str(job) for job in jobs]
    if not found:
        # A job that has not taken its lock yet, or has given it back and is about to end.
        found = [f"process {pid}" for pid, command in _processes(root) if _is_job(command)]
    return found, POLL_SLURM_S if jobs else POLL_S


class _Say(Protocol):
    def __call__(self, text: str) -> None: ...


@contextmanager
def _status_line() -> Iterator[_Say]:
    """A line that is rewritten in place on a terminal; else a new line for each new text."""
    console = Console()
    if console.is_terminal:
        with console.status("") as status:
            yield lambda text: status.update(text)
        return
    last = ""

    def say(text: str) -> None:
        nonlocal last
        if text != last:
            print(text, flush=True)
        last = text

    yield say


def _wait(root: Path, profile: str) -> None:
    """Wait until no stage and no job of `root` is at work."""
    slurm = _uses_slurm(root, profile)
    found, pause_s = _at_work(root, slurm)
    if not found:
        return
    print("What a killed Snakemake left behind is still at work:", flush=True)
    try:
        with _status_line() as say:
            while found:
                say(f"waiting for {'; '.join(found)}")
                time.sleep(pause_s)
                found, pause_s = _at_work(root, slurm)
    except KeyboardInterrupt:
        print(f"left running: {'; '.join(found)}", flush=True)
        raise
    print("It has ended.", flush=True)


def _snakemake(profile: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "snakemake", "--profile", profile, *options]


def resume(directory: Path, profile: str) -> NoReturn:
    """Go on with the project in `directory`; the process becomes Snakemake.

    So its exit code is Snakemake's, and signals reach Snakemake.

    Raises:
        Ms4Error: it is no project, Snakemake runs there, or it cannot be unlocked.
        KeyboardInterrupt: while waiting; what was waited for is left running.
    """
    root = directory.resolve()
    for name in ("Snakefile", "config/config.yaml"):
        if not (root / name).is_file():
            raise Ms4Error(
                f"{directory}: not a project, it has no {name}. "
                "Name the directory in which Snakemake was started."
            )
    _refuse_beside_snakemake(root)
    _wait(root, profile)
    _refuse_beside_snakemake(root)  # somebody may have started one while we waited
    os.chdir(root)
    locks = root / ".snakemake" / "locks"
    if locks.is_dir() and any(locks.iterdir()):
        print("Snakemake was killed and left its lock; removing it.", flush=True)
        unlocked = subprocess.run(_snakemake(profile, "--unlock"), check=False)
        if unlocked.returncode:
            raise Ms4Error(
                f"Snakemake could not remove its lock in {root}: see what it says above."
            )
    command = _snakemake(profile)
    print(f"snakemake --profile {profile}", flush=True)
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted here
