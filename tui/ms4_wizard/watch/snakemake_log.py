"""Snakemake's own logs, `.snakemake/log/*.snakemake.log`: which jobs began and ended, and when.

They are meant for people, so that this reads the few lines that it knows and passes over the rest:
what is cut short or unknown takes away knowledge and never more.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

DIRECTORY = Path(".snakemake/log")
KEPT = 8
"""Logs that are looked into, the newest: a stage that ran before those has no times."""

_TIME = re.compile(r"\[(\w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4})\]")
_BEGIN = re.compile(r"(?:local)?(?:rule|checkpoint) (\w+):")
_JOB = re.compile(r"    jobid: (\d+)")
_END = re.compile(r"Finished jobid: \d+ \(Rule: (\w+)\)")
_FAILED = re.compile(r"Error in rule (\w+):")
_SUBMITTED = re.compile(r"Job (\d+) has been submitted with SLURM jobid (\S+?)[ .(]")
_STATS = re.compile(r"(\w+) +\d+")
_HOST = re.compile(r"  Host: (\S+)")


@dataclass
class Job:
    """A rule's latest job in a log."""

    state: Literal["begun", "finished", "failed"]
    begun: float | None = None
    """When it was started or submitted, seconds since the epoch."""
    ended: float | None = None
    slurm: str | None = None
    """Slurm's number for it."""


@dataclass
class Session:
    """One call of Snakemake, as its log has it so far."""

    path: Path
    host: str | None = None
    """Where it runs or ran."""
    planned: set[str] = field(default_factory=set)
    """Rules that it set out to run."""
    jobs: dict[str, Job] = field(default_factory=dict)
    """By rule."""
    asked_to_stop: bool = False
    """It will begin no more jobs, because somebody asked it to end."""
    ended: bool = False


def parse(path: Path, text: str) -> Session | None:
    """Read a log; None if it is not that of a run (`snakemake --unlock` leaves one, too).

    Args:
        path: of the log.
        text: what it holds so far.
    """
    if "Building DAG of jobs" not in text:
        return None
    session = Session(path)
    rule_of: dict[str, str] = {}
    now: float | None = None
    rule, in_stats = "", False
    for line in text.splitlines():
        if found := _TIME.fullmatch(line):
            now = _seconds(found[1])
        elif found := _BEGIN.fullmatch(line):
            rule = found[1]
            session.jobs[rule] = Job("begun", now)
        elif found := _JOB.fullmatch(line):
            rule_of[found[1]] = rule
        elif found := _END.fullmatch(line):
            _close(session, found[1], "finished", now)
        elif found := _FAILED.fullmatch(line):
            rule = found[1]
            _close(session, rule, "failed", now)
        elif found := _SUBMITTED.match(line):
            if (submitted := rule_of.get(found[1])) in session.jobs:
                session.jobs[submitted].slurm = found[2]
        elif line.startswith("Job stats:"):
            in_stats = True
        elif in_stats:
            if found := _STATS.fullmatch(line):
                session.planned.add(found[1])
            in_stats = bool(line) and not line.startswith("total ")
        elif found := _HOST.fullmatch(line):
            session.host = found[1]
        elif line.startswith(("Will exit after finishing", "Terminating processes on user")):
            session.asked_to_stop = True
        elif line.startswith("Complete log(s):"):
            session.ended = True
    session.planned -= {"all", "total"}
    return session


def _close(
    session: Session, rule: str, state: Literal["finished", "failed"], now: float | None
) -> None:
    job = session.jobs.setdefault(rule, Job("begun"))
    job.state, job.ended = state, now


def _seconds(text: str) -> float | None:
    try:
        return time.mktime(time.strptime(text))
    except ValueError:
        return None


class Logs:
    """The logs of a project, each read again only when it has changed."""

    def __init__(self, root: Path) -> None:
        self._directory = root / DIRECTORY
        self._read: dict[Path, tuple[tuple[int, int], Session | None]] = {}

    def sessions(self) -> list[Session]:
        """The latest calls of Snakemake, the oldest first."""
        found = []
        for path in sorted(self._directory.glob("*.snakemake.log"))[-KEPT:]:
            try:
                status = path.stat()
                version = status.st_size, status.st_mtime_ns
                if self._read.get(path, (None,))[0] != version:
                    text = path.read_text(encoding="utf-8", errors="replace")
                    self._read[path] = version, parse(path, text)
            except OSError:
                continue  # it was just removed
            session = self._read[path][1]
            if session is not None:
                found.append(session)
        return found
