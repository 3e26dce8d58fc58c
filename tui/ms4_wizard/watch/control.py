"""Starting a project's run so that it outlives whoever started it, and stopping it cleanly."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from ms4 import resume
from ms4.cli import CONFIG
from ms4.errors import Ms4Error
from ms4_wizard.watch.stages import LAUNCHED, Snapshot

SCANCEL_S = 20.0
"""Seconds that `scancel` may take: it talks to the cluster's controller."""


def check_project(root: Path) -> None:
    """Check that a directory holds a pipeline.

    Raises:
        Ms4Error: it does not.
    """
    for name in ("Snakefile", str(CONFIG)):
        if not (root / name).is_file():
            raise Ms4Error(
                f"{root}: not a project, it has no {name}. Name a directory that ms4-wizard wrote."
            )


def start(root: Path, profile: str) -> psutil.Popen:
    """Start Snakemake in `root`, or take it up again after a stop or a kill.

    It is `ms4 resume`, which waits for what a killed Snakemake left behind, unlocks and becomes
    Snakemake. It has a session of its own, so that neither Ctrl-C nor a closed terminal ends it.
    What it prints goes to `logs/snakemake.log`.

    Raises:
        Ms4Error: it is no project, or its log cannot be written.
    """
    check_project(root)
    path = root / LAUNCHED
    command = [sys.executable, "-m", "ms4", "resume", ".", "--profile", profile]
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as log:
            return psutil.Popen(
                command,
                cwd=root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
    except OSError as error:
        raise Ms4Error(f"{path}: cannot be written ({error.strerror}).") from error


class Stopper:
    """Stops a run: Snakemake begins no more jobs, and the stages at work get SIGTERM, at which the
    training writes a checkpoint. To be called at each look until nothing is at work: a stage that
    was just about to begin shows itself only then."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._told: set[tuple[int, float]] = set()
        """Process id and start of what got its signal: a second one would end a training that is
        writing its checkpoint."""
        self._queue_cleared = False

    def stop(self, seen: Snapshot) -> None:
        """Send the signals that are still to be sent.

        Raises:
            Ms4Error: Snakemake runs on another host, or Slurm does not answer.
        """
        if seen.runner is None and seen.elsewhere is not None:
            raise Ms4Error(
                f"Snakemake runs on {seen.elsewhere}: stop it there, or it would only start the "
                "stage again."
            )
        if seen.runner is not None:
            self._tell(seen.runner)
        if not self._queue_cleared:
            self._queue_cleared = True
            for job in resume.slurm_jobs(self._root, required=False):
                # Those that have not begun; the others have an owner, who saves what it has.
                _scancel("--state=PENDING", job.number)
        for owner in seen.owners:
            if owner.host == socket.gethostname():
                self._tell(owner.pid)
            elif owner.slurm_job and (owner.pid, owner.started) not in self._told:
                self._told.add((owner.pid, owner.started))
                _scancel("--signal=TERM", owner.slurm_job)

    def _tell(self, pid: int) -> None:
        try:
            process = psutil.Process(pid)
            key = pid, process.create_time()
            if key not in self._told:
                process.send_signal(signal.SIGTERM)
                self._told.add(key)
        except psutil.NoSuchProcess:
            return
        except psutil.AccessDenied as error:
            raise Ms4Error(f"process {pid} belongs to another user, who has to stop it.") from error


def _scancel(option: str, job: str) -> None:
    if shutil.which("scancel") is None:
        raise Ms4Error("`scancel` is not on PATH: stop it on a machine that sees the cluster.")
    try:
        done = subprocess.run(
            ["scancel", option, job], capture_output=True, text=True, timeout=SCANCEL_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Ms4Error("Slurm's controller does not answer; the run goes on.") from error
    if done.returncode and "Invalid job id" not in done.stderr:
        raise Ms4Error(f"scancel {job}: {done.stderr.strip()}")
