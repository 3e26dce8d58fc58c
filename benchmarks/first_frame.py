"""Seconds from starting `ms4-wizard` to its first frame in a terminal, against a bare Python."""

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
import termios
import time

from common import CHECKOUT, record

RUNS = 15
LIMIT_S = 30
CLAIM = "The time from starting the wizard to its first frame; the aim is 0.5 s."
FRAME = b"1 of 9"
"""In the first frame: the first step of nine."""


def first_frame() -> float:
    """Start the wizard on a terminal of 80 × 24 and wait for its first frame."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "ms4_wizard"],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=CHECKOUT,
        env=environment,
        start_new_session=True,
    )
    os.close(follower)
    seen = b""
    try:
        while FRAME not in seen:
            if not select.select([leader], [], [], LIMIT_S)[0]:
                sys.exit(f"no first frame after {LIMIT_S} s; the terminal got {seen!r}")
            seen += os.read(leader, 65536)
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


def main() -> None:
    """Alternate the two, the first pair unmeasured (it fills the disk's cache), and record."""
    frames, bare = [], []
    for number in range(RUNS + 1):
        pair = first_frame(), bare_python()
        if number:
            frames.append(pair[0])
            bare.append(pair[1])
    record(
        "first_frame",
        CLAIM,
        {
            "first_frame_seconds": {
                "median": round(statistics.median(frames), 3),
                "min": round(min(frames), 3),
                "max": round(max(frames), 3),
            },
            "bare_python_seconds": round(statistics.median(bare), 3),
            "nvidia_smi": shutil.which("nvidia-smi") is not None,
            "ratio": round(statistics.median(frames) / statistics.median(bare), 1),
        },
    )


if __name__ == "__main__":
    main()
