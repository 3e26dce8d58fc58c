"""Seconds from starting `ms4-wizard` to its first frame in a terminal, against two well-known
Textual applications in environments of their own, and a bare Python."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import CHECKOUT, record

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


def first_frame(command: list[str], text: bytes, home: Path) -> float:
    """Start a command on a terminal of 80 × 24 and wait until a text is drawn.

    Args:
        command: to start.
        text: that its first frame holds.
        home: a directory for what it keeps of itself.
    """
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "HOME": str(home)}
    environment |= {name: str(home) for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME")}
    if command[0] == sys.executable:
        environment["PYTHONPATH"] = f"{CHECKOUT / 'workflow'}:{CHECKOUT / 'tui'}"
    else:
        environment.pop("PYTHONPATH", None)
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=home,
        env=environment,
        start_new_session=True,
    )
    os.close(follower)
    seen = b""
    try:
        while text not in seen:
            if not select.select([leader], [], [], LIMIT_S)[0]:
                sys.exit(f"{command}: no {text!r} after {LIMIT_S} s; the terminal got {seen!r}")
            try:
                seen += os.read(leader, 65536)
            except OSError:  # the terminal is closed: it ended
                sys.exit(f"{command} ended; the terminal got {seen!r}")
        return time.perf_counter() - started
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(leader)


def bare_python() -> float:
    """Start Python and import nothing: what no program of ours can go below."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return time.perf_counter() - started


def install(directory: Path, requirement: str) -> Path:
    """An environment with one application; returns its directory of programs."""
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    pip = [directory / "bin/python", "-m", "pip", "install", "--quiet", requirement]
    subprocess.run(pip, check=True)
    return directory / "bin"


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and extremes."""
    return {
        "median": round(statistics.median(seconds), 3),
        "min": round(min(seconds), 3),
        "max": round(max(seconds), 3),
    }


def main() -> None:
    """Take turns, the first turn unmeasured (it fills the disk's cache), and record."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "log.txt").write_text("a line of a log\n", encoding="utf-8")
        wizard = [sys.executable, "-m", "ms4_wizard"]
        measured: dict[str, Callable[[], float]] = {
            "bare python": bare_python,
            "ms4-wizard": lambda: first_frame(wizard, FRAME, root),
        }
        for app, (requirement, command, text) in OTHERS.items():
            program = str(install(root / app, requirement) / command[0])
            whole = [program, *command[1:]]
            measured[app] = lambda whole=whole, text=text: first_frame(  # type: ignore[misc]
                whole, text, root
            )
        times: dict[str, list[float]] = {app: [] for app in measured}
        for number in range(RUNS + 1):
            for app, measure in measured.items():
                seconds = measure()
                if number:
                    times[app].append(seconds)
    result: dict[str, Any] = {app: summary(seconds) for app, seconds in times.items()}
    record(
        "first_frame",
        CLAIM,
        {
            "seconds": result,
            "versions": [requirement for requirement, _, _ in OTHERS.values()],
            "nvidia_smi": shutil.which("nvidia-smi") is not None,
            "load_average": os.getloadavg()[0],
        },
    )


if __name__ == "__main__":
    main()
