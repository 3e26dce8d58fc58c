"""The state of a project's run: what each stage is doing, and who runs it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from ms4 import config, lock
from ms4.cli import CONFIG
from ms4.config import STAGES
from ms4.errors import Ms4Error
from ms4.manifest import WEIGHTS
from ms4.resume import find_resume, find_snakemake
from ms4_wizard.watch.follow import Follower
from ms4_wizard.watch.metrics import Metrics, MetricsFile, number
from ms4_wizard.watch.snakemake_log import Logs, Session

OUTPUTS: Mapping[str, Path] = {
    "fetch": Path("weights/source.json"),
    "descale": Path("weights/base.json"),
    "verify": Path("results/verify.json"),
    "preprocess": Path("results/data.json"),
    "plan": Path("results/plan.json"),
    "train": Path("results/train.json"),
    "evaluate": Path("results/evaluation.json"),
    "deliver": Path("results/deliver.json"),
}
"""What each stage leaves when it is done."""

LAUNCHED = Path("logs/snakemake.log")
"""What the Snakemake that was started from here prints."""

SCAN_EVERY_S = 5.0
"""Seconds between two looks at all processes of this host, if nothing is known to run."""

State = Literal["waiting", "queued", "running", "done", "failed", "stopped"]


@dataclass(frozen=True)
class Stage:
    """A stage of the run."""

    name: str
    state: State
    """`queued`: Snakemake has begun its job, which is not at work yet; `stopped`: it was ended from
    outside and will go on where it was."""
    seconds: float | None = None
    """How long it runs or ran, on Slurm with its wait in the queue once it is done; None if that is
    not known."""
    slurm_job: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """All that is known of a run at one moment."""

    stages: tuple[Stage, ...]
    owners: tuple[lock.Owner, ...]
    """The stages' processes that are at work."""
    runner: int | None
    """Process id, on this host, of the Snakemake that runs it, or of what waits to become it."""
    waits: bool
    """The runner waits for what a killed Snakemake left behind."""
    elsewhere: str | None
    """Another host on which Snakemake runs, as far as its log says."""
    stopping: bool
    """Snakemake was asked to end and begins nothing new."""
    metrics: Metrics
    steps: int | None
    """Optimizer steps of the whole training."""
    planned_gib: float | None
    """The memory plan's peak."""

    @property
    def current(self) -> Stage | None:
        """The stage to look at: the one that runs, else the last that did anything."""
        for states in (("running",), ("queued",), ("failed", "stopped")):
            found = [stage for stage in self.stages if stage.state in states]
            if found:
                return found[-1]
        done = [stage for stage in self.stages if stage.state == "done"]
        return done[-1] if done else None

    @property
    def finished(self) -> bool:
        """Whether all is done."""
        return all(stage.state == "done" for stage in self.stages)

    @property
    def alive(self) -> bool:
        """Whether anything is at work."""
        return self.runner is not None or bool(self.owners) or self.elsewhere is not None

    @property
    def says(self) -> str:
        """The state of the run in a few words."""
        failed = [stage.name for stage in self.stages if stage.state == "failed"]
        if self.waits:
            return "waits for what a killed run left" if self.owners else "starting"
        if self.alive and self.stopping:
            return "stopping"
        if self.runner is None and self.elsewhere is not None:
            return f"running on {self.elsewhere}"
        if self.runner is None and self.owners:
            return "Snakemake is gone, its job runs on"
        if self.alive:
            return "running"
        if self.finished:
            return "finished"
        if failed:
            return f"failed in {', '.join(failed)}"
        idle = all(stage.state == "waiting" for stage in self.stages)
        return "not started" if idle else "stopped"


class Watcher:
    """Looks at a project again and again. Nothing that it reads has to be there or be whole."""

    def __init__(self, root: Path) -> None:
        """
        Args:
            root: the project's directory.
        """
        self.root = root.resolve()
        self._logs = Logs(self.root)
        self._metrics = MetricsFile(self.root)
        self._train_log = Follower(self.root / "logs/train.log")
        self._last_words = ""
        self._config: tuple[tuple[int, int], config.RunConfig | None] | None = None
        self._runner: tuple[psutil.Process, bool] | None = None
        self._scanned = 0.0

    def look(self, now: float | None = None) -> Snapshot:
        """The run as it is.

        Args:
            now: seconds since the epoch, for how long a stage has been running.
        """
        now = time.time() if now is None else now
        self._find_runner()
        try:
            owners = tuple(lock.live_owners(self.root))
        except OSError:
            owners = ()  # the file system does not answer, or may not be written to
        sessions = self._logs.sessions()
        latest = sessions[-1] if sessions else None
        runner, waits = (self._runner[0].pid, self._runner[1]) if self._runner else (None, False)
        elsewhere = None
        if latest is not None and not latest.ended and latest.host not in (None, _this_host()):
            elsewhere = latest.host
        runs = (runner is not None and not waits) or elsewhere is not None
        outdated = self._outdated()
        there = {
            name
            for name in STAGES
            if (self.root / OUTPUTS[name]).is_file() and name not in outdated
        }
        stages = tuple(
            self._stage(name, name in there, sessions, owners, runs, now) for name in STAGES
        )
        plan = _read(self.root / OUTPUTS["plan"])
        train = _read(self.root / OUTPUTS["train"]) if "train" in there else {}
        metrics = self._metrics.read()
        if "train" in outdated and all(owner.stage != "train" for owner in owners):
            metrics = Metrics()
        steps = train.get("steps", plan.get("steps"))
        planned = number(plan.get("peak_gib"))
        return Snapshot(
            stages=stages,
            owners=owners,
            runner=runner,
            waits=waits,
            elsewhere=elsewhere,
            stopping=runs and latest is not None and not latest.ended and latest.asked_to_stop,
            metrics=metrics,
            steps=steps if type(steps) is int and steps > 0 else None,
            planned_gib=planned if planned > 0 else None,
        )

    def started(self, process: psutil.Process) -> None:
        """Note a runner that was just started; until it is Snakemake it may have to wait."""
        self._runner, self._scanned = (process, True), 0.0

    def _find_runner(self) -> None:
        try:
            if self._runner is not None and not self._runner[1] and _lives(self._runner[0]):
                return
            if self._runner is None and time.monotonic() - self._scanned < SCAN_EVERY_S:
                return
            self._scanned = time.monotonic()
            for find, waits in ((find_snakemake, False), (find_resume, True)):
                if (pid := find(self.root)) is not None:
                    self._runner = psutil.Process(pid), waits
                    return
            self._runner = None
        except psutil.NoSuchProcess:
            self._runner = None

    def _stage(
        self,
        name: str,
        done: bool,
        sessions: Sequence[Session],
        owners: Sequence[lock.Owner],
        runs: bool,
        now: float,
    ) -> Stage:
        for owner in owners:
            if owner.stage == name:
                return Stage(name, "running", max(0.0, now - owner.started), owner.slurm_job)
        latest = sessions[-1] if sessions else None
        session = next((one for one in reversed(sessions) if name in one.jobs), None)
        if runs and latest is not None and session is not latest and name in latest.planned:
            return Stage(name, "waiting")  # for the first time, or to be done again
        if session is None:
            return Stage(name, "done" if done else "waiting")
        job = session.jobs[name]
        seconds = job.ended - job.begun if job.ended and job.begun else None
        if job.state == "finished":
            # What it made may have been removed since, or the configuration changed.
            return Stage(name, "done", seconds) if done else Stage(name, "waiting")
        if done and session is not latest:
            return Stage(name, "done")  # by `ms4 STAGE`, say
        if job.state == "begun" and runs and session is latest:
            return Stage(name, "queued", now - job.begun if job.begun else None, job.slurm)
        asked = session.asked_to_stop or (name == "train" and self._stopped_by_a_signal())
        return Stage(name, "stopped" if asked or job.state == "begun" else "failed", seconds)

    def _outdated(self) -> frozenset[str]:
        """Stages that must run again: their results, or what those were made of, are of another
        configuration. Of weights their manifests alone do not tell."""
        settings = self._settings()
        made = [name for name in STAGES if name not in WEIGHTS]
        for at, name in enumerate(made if settings is not None else ()):
            found = _read(self.root / OUTPUTS[name]).get("config_hash")
            if settings is not None and found not in (None, settings.part_hash(name)):
                return frozenset(made[at:])
        return frozenset()

    def _settings(self) -> config.RunConfig | None:
        """The configuration; None: it cannot be read, or is wrong."""
        path = self.root / CONFIG
        try:
            status = path.stat()
            version = status.st_mtime_ns, status.st_size
            if self._config is None or self._config[0] != version:
                self._config = version, None
                self._config = version, config.load(path)
        except (OSError, Ms4Error):
            return None
        return self._config[1]

    def _stopped_by_a_signal(self) -> bool:
        """Whether the training's last words are that it saved a checkpoint and stopped."""
        lines, anew = self._train_log.read()
        if lines or anew:
            self._last_words = lines[-1] if lines else ""
        return "stopped by SIGTERM" in self._last_words


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _this_host() -> str:
    return socket.gethostname()


def _read(path: Path) -> dict[str, Any]:
    """A manifest, or nothing if it is not there or not whole."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
