"""`ms4` in processes that die, wait or fail at a chosen call of the operating system.

The processes are forked from one parent that has imported torch, so that one costs tens of
milliseconds and not seconds, and every point can be tried. The parent starts no thread of Python.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

SYNCS = ("fsync", "fdatasync")
RENAMES = ("replace", "rename")
CHANGES = (*SYNCS, *RENAMES, "unlink", "mkdir", "link", "pwrite")
"""Functions of `os` that change files; what pathlib does goes by them too."""


@dataclass(frozen=True)
class Point:
    """The `number`-th call of a function of `os`, and what happens there."""

    call: str
    number: int
    when: Literal["before", "within", "after"]
    """`within` a write: half of it is done."""
    wait_for: Path | None = None
    """Go on when this file is there, and not die by SIGKILL."""
    error: int | None = None
    """Fail with this errno, and not die."""


@dataclass(frozen=True)
class Conditions:
    """Under which a process runs."""

    point: Point | None = None
    trace: Path | None = None
    """Where a line is written for each call in `CHANGES`: its name and the files, with tabs."""
    file_limit: int | None = None
    """Bytes of a file, at most."""
    sync_bytes: int | None = None
    """Written bytes after which a growing file is synced."""
    environment: Mapping[str, str] | None = None
    """All of its variables; None: those of the first process that was started."""
    threads: int | None = None
    memory: Path | None = None
    """Where the process writes, in bytes, what it held when it began and the most that it held."""


@dataclass(frozen=True)
class Result:
    """How a command ended: its exit code (negative: the signal that ended it), what it wrote."""

    code: int
    text: str


class Running:
    """A command that runs."""

    def __init__(self, process: BaseProcess, log: Path) -> None:
        self.process, self.log = process, log

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError):  # it has ended
            os.kill(self.process.pid, number)

    def result(self, seconds: float = 120) -> Result:
        """Wait until it has ended."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still runs: {self.log.read_text()}"
        return Result(self.process.exitcode, self.log.read_text(errors="replace"))


_warm = multiprocessing.get_context("forkserver")
_warm.set_forkserver_preload(["ms4.cli", "ms4.weights.convert", "tests.kill_points"])


def start(cwd: Path, *argv: str | Path, conditions: Conditions | None = None) -> Running:
    """Start `ms4` with arguments; its output goes to a file beside `cwd`."""
    log = cwd.with_name(f"{cwd.name}.{time.monotonic_ns()}.log")
    log.touch()
    words = [str(word) for word in argv]
    process = _warm.Process(
        target=_child, args=(cwd, log, words, conditions or Conditions()), daemon=True
    )
    process.start()
    return Running(process, log)


def ms4(cwd: Path, *argv: str | Path, conditions: Conditions | None = None) -> Result:
    """Run `ms4` with arguments to its end."""
    return start(cwd, *argv, conditions=conditions).result()


def _child(cwd: Path, log: Path, argv: list[str], conditions: Conditions) -> None:
    import torch

    from ms4.cli import main
    from ms4.weights import shards

    os.chdir(cwd)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if conditions.threads is not None:
        torch.set_num_threads(conditions.threads)
    if conditions.file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python has it from its start
        resource.setrlimit(resource.RLIMIT_FSIZE, (conditions.file_limit, conditions.file_limit))
    if conditions.environment is not None:
        os.environ.clear()
        os.environ.update(conditions.environment)
    if conditions.sync_bytes is not None:
        shards.SYNC_BYTES = conditions.sync_bytes
    if conditions.point is not None or conditions.trace is not None:
        _watch(conditions)
    before = _status_bytes("VmRSS")
    code = main(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if conditions.memory is not None:
        conditions.memory.write_text(f"{before} {_status_bytes('VmHWM')}")
    sys.exit(code)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _watch(conditions: Conditions) -> None:
    """Count the calls in `CHANGES` and let happen what is to happen."""
    counts: Counter[str] = Counter()
    guard = threading.Lock()
    point, trace = conditions.point, -1
    if conditions.trace is not None:
        trace = os.open(conditions.trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def happen() -> None:
        if point is not None and point.error is not None:
            raise OSError(point.error, os.strerror(point.error))
        if point is None or point.wait_for is None:
            os.kill(os.getpid(), signal.SIGKILL)
            return
        while not point.wait_for.exists():
            time.sleep(0.01)

    def watched(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with guard:
                counts[name] += 1
                here = point is not None and (point.call, point.number) == (name, counts[name])
            if trace >= 0:
                os.write(trace, f"{name}\t{_files(args)}\n".encode())
            if here and point is not None and point.when == "before":
                happen()
            if here and point is not None and point.when == "within":
                plain(args[0], memoryview(args[1])[: len(args[1]) // 2], *args[2:])
                happen()
            try:
                return plain(*args, **options)
            finally:
                if here and point is not None and point.when == "after":
                    happen()

        return call

    for name in CHANGES:
        setattr(os, name, watched(name, getattr(os, name)))


def _files(args: tuple[Any, ...]) -> str:
    """The files that a call is about: for a rename two, the old name first."""
    if isinstance(args[0], int):
        return str(Path(f"/proc/self/fd/{args[0]}").readlink())
    names = [part for part in args[:2] if isinstance(part, str | os.PathLike)]
    return "\t".join(str(Path(name).absolute()) for name in names)


def content(base: Path) -> dict[str, bytes]:
    """All files of a base but its locks, the records without their time stamps."""
    files = {}
    for path in sorted(base.rglob("*")):
        name = path.relative_to(base)
        if path.is_dir() or name.parts[0] == "locks":
            continue
        files[str(name)] = path.read_bytes()
        if name.parts[0] == ".pieces" and path.suffix == ".json":
            record = json.loads(path.read_text())
            del record["mtime_ns"]
            files[str(name)] = json.dumps(record).encode()
    return files


def read_trace(path: Path) -> list[list[str]]:
    """The calls of a trace in their order: each its name and its files."""
    return [line.split("\t") for line in path.read_text().splitlines()]


def named_after_syncs(trace: list[list[str]]) -> set[Path]:
    """The files that got their names by a rename, each of which is asserted to be durable: synced
    before it with nothing written since, and the directory synced after it."""
    named = set()
    for number, (call, *files) in enumerate(trace):
        if call not in RENAMES:
            continue
        temporary, path = files
        calls = [c for c, file, *_ in trace[:number] if file == temporary]
        assert "fsync" in calls, temporary
        assert "pwrite" not in calls[calls.index("fsync") :], temporary
        assert ["fsync", str(Path(path).parent)] in trace[number + 1 :], path
        named.add(Path(path))
    return named
