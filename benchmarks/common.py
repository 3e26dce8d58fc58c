"""What the benchmarks share: a project directory, a timed command, a record with the machine."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import platform
import pty
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from ms4 import config
from ms4_wizard import answers_file, emit, project
from ms4_wizard.answers import Answers
from ms4_wizard.draft import Draft

CHECKOUT = Path(__file__).resolve().parents[1]
RECORDS = CHECKOUT / "benchmarks/records"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "snakemake")


def make_project(root: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The demo's project as the wizard writes it, its answers changed by a function."""
    draft = Draft.of(answers_file.read_answers(str(CHECKOUT / "examples/answers.yaml"), []))
    change(draft.values)
    answers = config.check(draft.values, "the demo's answers", model=Answers)
    files = emit.project_files(emit.relocate(answers, CHECKOUT, root))
    project.write_project(root, files, answers.where)
    return root


def run(root: Path, *command: str) -> dict[str, float]:
    """Run a command in a project; wall and CPU seconds, and its processes' peak memory in GiB.

    The memory is the sum over all its processes, looked at ten times a second; what they share is
    counted once for each, so that the sum is rather too large. CPU seconds well below the cores
    times the wall seconds of a stage that computes are those of a machine that did other work too.

    Raises:
        SystemExit: it failed; its last lines are shown.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    peak = 0
    with tempfile.TemporaryFile("w+") as output:
        process = psutil.Popen(
            command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True
        )
        while process.poll() is None:
            peak = max(peak, _memory(process))
            with suppress(psutil.TimeoutExpired):
                process.wait(0.1)
        if process.returncode:
            output.seek(0)
            sys.exit(output.read()[-4000:])
    seconds = time.perf_counter() - started
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = spent.ru_utime + spent.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_gib": round(peak / 2**30, 2),
    }


def on_a_terminal(
    command: list[str], place: Path, **environment: str
) -> tuple[subprocess.Popen[bytes], int]:
    """Start a command on a terminal of 80 × 24 of its own; its process, and the terminal's other
    end. What it keeps of itself goes to `place`, which is its current directory."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    own = {**os.environ, "TERM": "xterm-256color", "HOME": str(place)}
    own |= {name: str(place) for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME")}
    own.pop("PYTHONPATH", None)
    if command[0] == sys.executable:
        own["PYTHONPATH"] = f"{CHECKOUT / 'workflow'}:{CHECKOUT / 'tui'}"
    process = subprocess.Popen(
        command,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=place,
        env=own | environment,
        start_new_session=True,
        # Its own, as a shell's: whoever closes the other end, a killed benchmark too, hangs it up.
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(follower)
    return process, leader


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    """Median, least and most."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def peak_gib() -> float:
    """The most memory of this process so far. getrusage's would begin with its parent's."""
    with Path("/proc/self/status").open(encoding="ascii") as file:
        kib = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    return round(kib / 2**20, 3)


def _memory(process: psutil.Process) -> int:
    """Bytes of memory that a process and its descendants hold."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += one.memory_info().rss
    return total


def _version(package: str) -> str | None:
    """None where it is not installed: a machine for computing alone has no workflow."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Processor, cores, memory and versions; no host name."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def record(name: str, claim: str, result: Any) -> None:
    """Print a result and keep it, dated, in benchmarks/records/."""
    _write(name, {"claim": claim, "machine": machine(), "result": result})
    print(json.dumps(result, indent=2))


def record_part(name: str, claim: str, part: str, figures: Any) -> None:
    """Print a part of a benchmark and keep it beside the parts that the latest record has.

    Every part has its own date and machine, under `measured`: what was not measured again stays as
    old as it is.
    """
    latest = sorted(RECORDS.glob(f"????-??-??-{name}.json"))
    result: dict[str, Any] = {}
    measured: dict[str, Any] = {}
    if latest:
        before = json.loads(latest[-1].read_text(encoding="utf-8"))
        result = before["result"]
        then = {"date": before["date"], "machine": before.get("machine")}
        measured = {other: before.get("measured", {}).get(other, then) for other in result}
    result[part] = figures
    measured[part] = {"date": _today(), "machine": machine()}
    _write(name, {"claim": claim, "measured": measured, "result": result})
    print(part, json.dumps(figures, indent=2), flush=True)


def public_data(what: str, *, required: bool) -> Path | None:
    """The directory of public data sets that MS4_TEST_DATA names.

    Args:
        what: is skipped, and said to be, if there is none.
        required: someone asked for it by name; then it is an error instead.
    """
    named = os.environ.get("MS4_TEST_DATA")
    if named:
        return Path(named)
    text = f"{what}: MS4_TEST_DATA is not set; it names the directory that holds gsm8k/"
    if required:
        sys.exit(text)
    print(f"skipped: {text}")
    return None


def _today() -> str:
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()


def _write(name: str, content: dict[str, Any]) -> None:
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / f"{_today()}-{name}.json"
    whole = {"command": f"python benchmarks/{name}.py", "date": _today(), **content}
    path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    print(f"recorded in {path}")
