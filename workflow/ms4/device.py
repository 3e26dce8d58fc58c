"""The device that trains, as it is seen from here without torch: a GPU, or the CPU and its RAM."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from ms4.config import RunConfig
from ms4.errors import Ms4Error

GIB = 2**30
CGROUPS = Path("/sys/fs/cgroup")

DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Device:
    """The device that trains."""

    kind: DeviceKind
    name: str
    total: int | None
    """Its memory in bytes; None if it is not to be seen from here."""
    free: int
    """What the run may take now, in bytes, if the configuration gives no budget."""
    reason: str
    """Why this one."""


@dataclass(frozen=True)
class Gpu:
    """What a maker publishes of a GPU."""

    name: str
    gib: float
    """Memory that `nvidia-smi` shows, in GiB."""
    teraflops: float
    """Dense BF16 products with FP32 sums, 10¹² operations a second."""
    gigabytes_per_s: float
    """Bandwidth of its memory, 10⁹ bytes a second."""
    watts: int
    """Its power limit."""


GPUS = (
    Gpu("H200 SXM", 140.4, 989, 4800, 700),
    Gpu("H100 SXM", 79.6, 989, 3350, 700),
    Gpu("A100 SXM 80 GB", 80.0, 312, 2039, 400),
    Gpu("L40S", 45.0, 362, 864, 350),
    Gpu("A100 SXM 40 GB", 40.0, 312, 1555, 400),
    Gpu("RTX 4090", 24.0, 165, 1008, 450),
    Gpu("RTX 3090", 24.0, 71, 936, 350),
)
"""Ceilings from the makers' data sheets, without sparsity. Not measured here."""


def gpus_called(name: str) -> list[Gpu]:
    """The GPUs of the table that a driver or Slurm calls so: by the whole word of their model, as
    in `NVIDIA A100-SXM4-80GB` or `nvidia_geforce_rtx_4090`."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return [gpu for gpu in GPUS if gpu.name.removeprefix("RTX ").split()[0].lower() in words]


def find_device(config: RunConfig, gpu: tuple[Device | None, str] | None = None) -> Device:
    """The device that will train, and its memory.

    Args:
        config: says which is wanted.
        gpu: what `find_gpu` found; None: it is asked, if that may be the device.

    Raises:
        Ms4Error: `run.device` is `cuda` and there is no such device, or its size is unknown.
    """
    wanted = config.run.device
    if wanted != "cpu":
        found, why = find_gpu() if gpu is None else gpu
        if found is not None:
            return found
        if wanted == "cuda" and config.run.memory_gib is not None:
            budget = int(config.run.memory_gib * GIB)
            return Device("cuda", "CUDA device", None, budget, "run.device says so")
        if wanted == "cuda":
            raise Ms4Error(
                f"run.device is `cuda`, but {why}. Plan on the machine that trains, or say in "
                "run.memory_gib how much memory its GPU has."
            )
    reason = "run.device says so" if wanted == "cpu" else f"{why}, and run.device is `auto`"
    memory = psutil.virtual_memory()
    limit = min([memory.total, *memory_limits()])
    return Device("cpu", "CPU", limit, min(limit, memory.available), reason)


def find_gpu() -> tuple[Device | None, str]:
    """The first GPU that CUDA would show, or why there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and (not visible.strip() or visible.startswith("-1")):
        return None, "CUDA_VISIBLE_DEVICES hides all GPUs"
    if shutil.which("nvidia-smi") is None:
        return None, "nvidia-smi is not installed here"
    command = ["nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits"]
    if visible:
        command.append(f"--id={visible.split(',')[0].strip()}")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return None, "nvidia-smi does not answer"
    if answer.returncode or not answer.stdout.strip():
        said = (answer.stderr or answer.stdout).strip().splitlines()
        return None, f"nvidia-smi finds no GPU ({said[0] if said else 'it says nothing'})"
    memory, _, name = answer.stdout.strip().splitlines()[0].partition(",")
    if not memory.strip().isdigit():
        # GPUs that share the host's memory report none of their own.
        return None, f"nvidia-smi gives no memory size for {name.strip()}"
    total = int(memory) * 2**20
    return Device("cuda", name.strip(), total, total, "nvidia-smi lists it"), ""


def memory_limits() -> Iterator[int]:
    """Limits of the containers and batch jobs around this process (control groups), in bytes."""
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        # Version 2, or 1. In a container the mount's root is the container's own group.
        name = "memory/memory.limit_in_bytes" if controllers else "memory.max"
        group = Path(path.lstrip("/"))
        for level in (group, *group.parents):
            limit = CGROUPS / Path(name).parent / level / Path(name).name
            text = limit.read_text(encoding="ascii").strip() if limit.is_file() else ""
            if text.isdigit() and int(text) > 0:
                yield int(text)
