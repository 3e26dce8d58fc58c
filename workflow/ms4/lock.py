"""One writer for a stage's files: a lock that dies with its process.

Two layers. `flock` is released by the kernel when the process ends, however it ends.
Some Lustre, GPFS and NFS mounts grant it to everyone without a word, so an owner file
made by exclusive creation stands beside it: host, process, start time, Slurm job, and
a heartbeat. An owner on this host is alive if its process is; one on another host
is alive while its heartbeat moves.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import psutil

from ms4.errors import Ms4Error

LOCKS = Path("locks")
HEARTBEAT_S = 10.0
"""Seconds between two touches of the owner file."""
STALE_S = 60.0
"""An owner on another host whose file was not touched for so many seconds is dead."""
ORPHANS_S = 3.0
"""Seconds that processes which a killed owner had forked are given to end."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    stage: str
    host: str
    pid: int
    started: float
    """Start of the process, seconds since the epoch: tells a reused process id."""
    slurm_job: str | None

    def __str__(self) -> str:
        job = f", Slurm job {self.slurm_job}" if self.slurm_job else ""
        return f"`ms4 {self.stage}` (process {self.pid} on {self.host}{job})"


def _this_process(stage: str) -> Owner:
    return Owner(
        stage=stage,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        slurm_job=os.environ.get("SLURM_JOB_ID"),
    )


def _process_lives(owner: Owner) -> bool:
    try:
        process = psutil.Process(owner.pid)
        # Boot-time rounding moves create_time by up to a clock tick between calls.
        return (
            abs(process.create_time() - owner.started) < 2
            and process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.NoSuchProcess:
        return False


def _seconds_since_touch(path: Path) -> float:
    """Age of `path` by the file system's own clock, which may differ from this host's."""
    probe = path.with_name(f".clock.{os.getpid()}.{threading.get_ident()}")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink()


def read_owner(path: Path) -> Owner | None:
    """The owner that the file names, or None if there is none or it was cut short by a kill."""
    content = _content(path)
    return None if content is None else _owner(content)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _owner(content: bytes) -> Owner | None:
    try:
        return Owner(**json.loads(content))
    except (ValueError, TypeError):
        return None


def is_alive(path: Path, owner: Owner) -> bool:
    """Whether the owner that `path` names still runs."""
    if owner.host == socket.gethostname():
        return _process_lives(owner)
    try:
        return _seconds_since_touch(path) < STALE_S
    except FileNotFoundError:
        return False


def live_owners(root: Path) -> list[Owner]:
    """The stages that run in the project at `root` now."""
    found = []
    for path in sorted((root / LOCKS).glob("*.owner")):
        owner = read_owner(path)
        if owner is not None and is_alive(path, owner):
            found.append(owner)
    return found


@contextmanager
def hold(stage: str, directory: Path = LOCKS) -> Iterator[None]:
    """Hold the lock of `stage`, in the current project unless another directory is given.

    Raises:
        Ms4Error: another process holds it; nothing was touched.
    """
    directory.mkdir(exist_ok=True)
    owner_path = directory / f"{stage}.owner"
    with (directory / f"{stage}.lock").open("a") as lock_file:
        _lock(lock_file, owner_path, stage)
        _claim(owner_path, stage)
        stop = threading.Event()
        heartbeat = threading.Thread(target=_beat, args=(owner_path, stop), daemon=True)
        heartbeat.start()
        try:
            yield
        finally:
            stop.set()
            owner_path.unlink(missing_ok=True)  # before the wait, which an interrupt may end
            heartbeat.join()


def _lock(file: IO[str], owner_path: Path, stage: str) -> None:
    """Lock the file; processes that a killed owner had forked hold it until they notice."""
    deadline = time.monotonic() + ORPHANS_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = read_owner(owner_path)
            lives = owner is not None and is_alive(owner_path, owner)
            if lives or time.monotonic() > deadline:
                raise _held(owner, stage, owner_path.parent) from None
            time.sleep(0.05)


def _claim(path: Path, stage: str) -> None:
    """Put our owner file in place by exclusive creation; a dead owner's is taken away first."""
    mine = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    mine.write_text(json.dumps(asdict(_this_process(stage))), encoding="utf-8")
    try:
        for _ in range(2):
            try:
                os.link(mine, path)  # atomic on NFS too, unlike O_EXCL of old
                return
            except FileExistsError:
                content = _content(path)
                if content is not None:
                    _take_away(path, content, mine, stage)
        raise _held(read_owner(path), stage, path.parent)
    finally:
        mine.unlink(missing_ok=True)


def _take_away(path: Path, content: bytes, mine: Path, stage: str) -> None:
    """Remove a dead owner's file, and never that of someone who was quicker to take its place.

    To look at a file and to remove it are two steps. So whoever removes one first makes a guard, by
    exclusive creation, that is named after the content: one process has that right at a time, and
    removes no other content by it. If it dies with the right, a guard that is named after its own
    passes the right on.

    Args:
        path: the owner file.
        content: what it was seen to hold.
        mine: a file that names this process, for the guard.
        stage: whose lock it is.

    Raises:
        Ms4Error: its owner lives, or another process is just taking its place.
    """
    dead, guards = content, [path]
    while True:
        owner = _owner(content)
        if owner is not None and is_alive(guards[-1], owner):
            raise _held(owner, stage, path.parent)
        key = hashlib.sha256(content).hexdigest()[:16]
        guards.append(path.with_name(f".{path.name}.{key}.taken"))
        try:
            os.link(mine, guards[-1])
            break
        except FileExistsError:
            found = _content(guards[-1])
            if found is None:
                return  # its work is done; look again
            content = found
    try:
        if _content(path) == dead:
            path.unlink()
    finally:
        for guard in guards[1:]:
            guard.unlink(missing_ok=True)


def _held(owner: Owner | None, stage: str, directory: Path) -> Ms4Error:
    here = directory.absolute().parent
    advice = (
        f"Run `ms4 resume {here}`, which waits for it and goes on."
        if directory == LOCKS  # of a project; what is locked elsewhere is no work of Snakemake's
        else "Run the same command again when that has ended."
    )
    return Ms4Error(
        f"{owner or f'another `ms4 {stage}`'} is at work in {here}; two writers would destroy each "
        f"other's files. {advice}"
    )


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_S):
        try:
            os.utime(path)
        except FileNotFoundError:
            return


def wait_until_free(root: Path, poll_s: float = 1.0) -> Iterator[list[Owner]]:
    """Yield the live owners of the project's locks every `poll_s` seconds until there is none."""
    while owners := live_owners(root):
        yield owners
        time.sleep(poll_s)
