"""Commands that tests run to their end, and waiting for what must happen."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


def run(
    *command: str | Path,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 800,
) -> subprocess.CompletedProcess[str]:
    """Run a command; standard error is joined to the output. It may fail.

    The timeout ends what hangs; it is far above what anything takes, also on a busy machine.
    """
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        timeout=timeout,
        check=False,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def snakemake(
    *options: str | Path,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 800,
) -> subprocess.CompletedProcess[str]:
    """Run Snakemake."""
    return run(sys.executable, "-m", "snakemake", *options, cwd=cwd, env=env, timeout=timeout)


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Wait until a condition holds; fail with its name if it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for: {what}"
        time.sleep(0.05)


def without_slurm_job() -> dict[str, str]:
    """The environment, as it is outside a Slurm job, of the same cluster."""
    return {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or not name.startswith("SLURM_")
    }


PEAK = '''
def peak():
    """Most bytes of memory of this process so far. getrusage would begin with its parent's."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
'''
"""For the beginning of a program that a test starts and whose memory it measures."""
