"""What the stages left, read once, and the run record: on what, with which versions, how long.

The record is the one file that holds host and time. It is made of a fixed list of facts and never
of the environment, which can hold tokens.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import ms4
from ms4.config import RunConfig, Stage
from ms4.errors import Ms4Error
from ms4.manifest import read_inputs, read_json, sha256_file, write_json
from ms4.report.table import EVALUATION, Pair, pair_rows

RESULTS = Path("results")
METRICS = RESULTS / "metrics.jsonl"
MACHINE = RESULTS / "train_machine.json"
EXAMPLES = RESULTS / "evaluation/examples.jsonl"

MANIFESTS: Mapping[Stage, Path] = {
    "fetch": Path("weights/source.json"),
    "descale": Path("weights/base.json"),
    "verify": RESULTS / "verify.json",
    "preprocess": RESULTS / "data.json",
    "plan": RESULTS / "plan.json",
    "train": RESULTS / "train.json",
    "evaluate": EVALUATION,
}

PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "huggingface_hub",
    "matplotlib",
    "mistral-common",
    "numpy",
    "peft",
    "pydantic",
    "safetensors",
    "snakemake",
    "snakemake-executor-plugin-slurm",
    "tokenizers",
    "torch",
    "transformers",
)


@dataclass(frozen=True)
class Run:
    """All that the stages before left, read once."""

    config: RunConfig
    manifests: Mapping[Stage, Mapping[str, Any]]
    metrics: Sequence[Mapping[str, Any]]
    machine: Mapping[str, Any]
    """How the training went on its machine; empty if it did not say."""
    examples: Sequence[Mapping[str, Any]]
    pairs: Sequence[Pair]

    @property
    def base_name(self) -> str:
        """The base model's id, or for a local one its directory's name: no path of this machine."""
        source = self.manifests["fetch"]
        if source["origin"] == "hub":
            return str(source.get("repository") or self.config.model.source)
        if source["origin"] == "tiny":
            return "ms4-tiny"
        return " ".join(Path(source["directory"]).name.split())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file.

    Raises:
        Ms4Error: it cannot be read, or a line is not a JSON object; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise Ms4Error(f"{path}: cannot be read ({error.strerror}).") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise Ms4Error(f"{path}:{number}: not valid JSON ({error}).") from error
        if not isinstance(value, dict):
            raise Ms4Error(f"{path}:{number}: not a JSON object.")
        found.append(value)
    return found


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The training's metrics, one line a step. A step that a resumed run did again counts once.

    Raises:
        Ms4Error: the file is missing, broken or empty.
    """
    by_step = {line["step"]: line for line in read_lines(path)}
    if not by_step:
        raise Ms4Error(f"{path}: holds no step. Remove results/train.json and run `ms4 train`.")
    return [by_step[step] for step in sorted(by_step)]


def read_run(config: RunConfig) -> Run:
    """Read what the stages before left in the current directory.

    Raises:
        Ms4Error: a file is missing, broken or of another configuration.
    """
    manifests = read_inputs(MANIFESTS, config)
    return Run(
        config=config,
        manifests=manifests,
        metrics=read_metrics(METRICS),
        machine=read_json(MACHINE) if MACHINE.exists() else {},
        examples=read_lines(EXAMPLES) if EXAMPLES.exists() else [],
        pairs=pair_rows(manifests["evaluate"]),
    )


# The record.


def package_versions() -> dict[str, str | None]:
    """Version of each package that decides a result; None if it is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Name, memory and driver of the GPUs, as nvidia-smi lists them."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,driver_version",
        "--format=csv,noheader",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return []
    return [] if answer.returncode else answer.stdout.strip().splitlines()


def write_record(path: Path, run: Run) -> None:
    """Write the run record to `path`: versions, machine, hashes of all manifests, configuration."""
    write_json(
        path,
        {
            "ms4_version": ms4.__version__,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": {
                "name": socket.gethostname(),
                "system": platform.platform(),
                "python": platform.python_version(),
                "cpu": _cpu(),
                "cores": os.cpu_count(),
                "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
                "gpus": _gpus(),
            },
            "packages": package_versions(),
            "training": dict(run.machine),
            "manifests": {
                stage: {"path": item.as_posix(), "sha256": sha256_file(item)}
                for stage, item in MANIFESTS.items()
            },
            "configuration": run.config.model_dump(mode="json"),
        },
    )
