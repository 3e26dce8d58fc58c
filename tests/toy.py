"""A small Snakemake project whose one stage holds a real lock until it is told to go on."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.commands import CHECKOUT

SNAKEFILE = """
import sys


rule train:
    output:
        "results/train.json",
    params:
        python=sys.executable,
    shell:
        "{params.python} stage.py"
"""

# Adds a line when it begins and one when it ends, and waits in between until it may go on: two at
# once would show as two begins in a row.
STAGE = """
import os, time
from pathlib import Path
from ms4 import lock

with lock.hold("train"), open("runs.txt", "a", buffering=1) as runs:
    runs.write(f"begin {os.getpid()}\\n")
    while not Path("go").exists():
        time.sleep(0.05)
    Path("results").mkdir(exist_ok=True)
    Path("results/train.json").write_text('{"stage": "train"}')
    runs.write(f"end {os.getpid()}\\n")
"""


def make_toy(root: Path) -> Path:
    """A project of one stage, with the profiles of the pipeline."""
    (root / "config").mkdir(parents=True)
    (root / "config/config.yaml").write_text("# a project's configuration\n")
    (root / "Snakefile").write_text(SNAKEFILE)
    (root / "stage.py").write_text(STAGE)
    shutil.copytree(CHECKOUT / "profiles", root / "profiles")
    (root / "local").symlink_to("profiles/local")
    (root / "slurm").symlink_to("profiles/slurm")
    return root


def runs(root: Path) -> list[str]:
    """What the stage wrote when it began and when it ended."""
    file = root / "runs.txt"
    return file.read_text().splitlines() if file.exists() else []
