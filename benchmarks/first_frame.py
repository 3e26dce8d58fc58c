"""Seconds from starting `ms4-wizard` to its first frame in a terminal, against two well-known
Textual applications in environments of their own, and a bare Python."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from common import on_a_terminal, record, spread

RUNS = 15
LIMIT_S = 60
CLAIM = "The time from starting the wizard to its first frame; the aim is 0.5 s."
OTHERS = {
    "harlequin": ("harlequin==2.17.0", ["harlequin", "--locale", "C"], b"Data Catalog"),
    "toolong": ("toolong==1.5.0", ["tl", "log.txt"], b"a line of a log"),
}
"""Name → what pip installs, its command, and text of its first frame."""
FRAME = b"New project"
"""In the wizard's first frame: the first choice."""


def first_frame(command: list[str], text: bytes, home: Path) -> tuple[float, float]:
    """Start a command on a terminal and wait until a text is drawn; wall seconds, and CPU seconds
    of the process and its children until then.

    Args:
        command: to start.
        text: that its first frame holds.
        home: a directory for what it keeps of itself.
    """
    started = time.perf_counter()
    process, leader = on_a_terminal(command, home)
    seen = b""
    try:
        while text not in seen:
            if not select.select([leader], [], [], LIMIT_S)[0]:
                sys.exit(f"{command}: no {text!r} after {LIMIT_S} s; the terminal got {seen!r}")
            try:
                seen += os.read(leader, 65536)
            except OSError:  # the terminal is closed: it ended
                sys.exit(f"{command} ended; the terminal got {seen!r}")
        return time.perf_counter() - started, sum(psutil.Process(process.pid).cpu_times()[:4])
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(leader)


def bare_python() -> tuple[float, float]:
    """Start Python and import nothing: what no program of ours can go below."""
    started, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    spent = os.times()
    cpu = spent.children_user + spent.children_system
    cpu -= before.children_user + before.children_system
    return time.perf_counter() - started, cpu


def install(directory: Path, requirement: str) -> Path:
    """An environment with one application; returns its directory of programs."""
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    pip = [directory / "bin/python", "-m", "pip", "install", "--quiet", requirement]
    subprocess.run(pip, check=True)
    return directory / "bin"


def main() -> None:
    """Take turns, the first turn unmeasured (it fills the disk's cache), and record."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "log.txt").write_text("a line of a log\n", encoding="utf-8")
        wizard = [sys.executable, "-m", "ms4_wizard"]
        measured: dict[str, Callable[[], tuple[float, float]]] = {
            "bare python": bare_python,
            "ms4-wizard": lambda: first_frame(wizard, FRAME, root),
        }
        for app, (requirement, command, text) in OTHERS.items():
            program = str(install(root / app, requirement) / command[0])
            whole = [program, *command[1:]]
            measured[app] = lambda whole=whole, text=text: first_frame(  # type: ignore[misc]
                whole, text, root
            )
        times: dict[str, list[tuple[float, float]]] = {app: [] for app in measured}
        for number in range(RUNS + 1):
            for app, measure in measured.items():
                taken = measure()
                if number:
                    times[app].append(taken)
    wall = {app: spread([seconds for seconds, _ in taken]) for app, taken in times.items()}
    cpu = {app: spread([seconds for _, seconds in taken]) for app, taken in times.items()}
    record(
        "first_frame",
        CLAIM,
        {
            "seconds": wall,
            "cpu_seconds": cpu,
            "versions": [requirement for requirement, _, _ in OTHERS.values()],
            "nvidia_smi": shutil.which("nvidia-smi") is not None,
            "load_average": os.getloadavg()[0],
        },
    )


if __name__ == "__main__":
    main()
