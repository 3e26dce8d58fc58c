"""What the benchmarks share: a project directory, a timed command, a record with the machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ms4 import config
from ms4_wizard import cli, emit, project
from ms4_wizard.questions import Answers, Draft

CHECKOUT = Path(__file__).resolve().parents[1]
RECORDS = CHECKOUT / "benchmarks/records"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "snakemake")


def make_project(root: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The demo's project as the wizard writes it, its answers changed by a function."""
    draft = Draft.of(cli.read_answers(str(CHECKOUT / "examples/answers.yaml"), []))
    change(draft.values)
    answers = config.check(draft.values, "the demo's answers", model=Answers)
    files = emit.project_files(emit.relocate(answers, CHECKOUT, root))
    project.write_project(root, files, answers.where)
    return root


def run(root: Path, *command: str) -> dict[str, float]:
    """Run a command in a project; wall seconds and the largest process's peak memory in GiB.

    Raises:
        SystemExit: it failed; its last lines are shown.
    """
    started = time.perf_counter()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit((done.stdout + done.stderr)[-4000:])
    # Linux counts KiB, and the maximum over all children so far.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {"seconds": round(time.perf_counter() - started, 1), "peak_gib": round(peak, 2)}


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
        **{name: version(name) for name in PACKAGES},
    }


def record(name: str, claim: str, result: Any) -> None:
    """Print a result and keep it, dated, in benchmarks/records/."""
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    content = {
        "claim": claim,
        "command": f"python benchmarks/{name}.py",
        "date": today,
        "machine": machine(),
        "result": result,
    }
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / f"{today}-{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    print(f"recorded in {path.relative_to(CHECKOUT)}")
