"""Projects in the middle of a run, by hand: the files that stages and Snakemake leave, with numbers
that never change."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import psutil

from ms4 import lock
from ms4.config import STAGES
from ms4_wizard.watch.stages import OUTPUTS

HEAD = """Assuming unrestricted shared filesystem usage.

SNAKEMAKE
=========
  Date: 2026-11-25 00:45:39
  Host: {host}
  Working directory: /somewhere

Building DAG of jobs...
Using shell: /usr/bin/bash
Job stats:
job           count
----------  -------
{stats}
all               1
total             {total}

Select jobs to execute...
"""
SECONDS = dict(zip(STAGES, (125, 18, 11, 13, 2, 3722, 74, 3), strict=True))
"""How long each stage takes in these logs."""


def begun(stage: str, second: int, slurm: str | None = None) -> str:
    number = STAGES.index(stage) + 1
    words = (
        f"{stamp(second)}\n{'' if slurm else 'local'}rule {stage}:\n    output: {OUTPUTS[stage]}\n"
    )
    words += f"    log: logs/{stage}.log\n    jobid: {number}\n    resources: mem_mb=4000\n"
    words += f"Shell command: ms4 {stage} --config config/config.yaml\n"
    if slurm:
        words += (
            f"Job {number} has been submitted with SLURM jobid {slurm} (log: /x/{slurm}.log).\n"
        )
    return words


def finished(stage: str, second: int) -> str:
    return f"{stamp(second)}\nFinished jobid: {STAGES.index(stage) + 1} (Rule: {stage})\n"


def failed(stage: str, second: int) -> str:
    number = STAGES.index(stage) + 1
    return f"{stamp(second)}\nError in rule {stage}:\n    message: None\n    jobid: {number}\n"


def stamp(second: int) -> str:
    minutes, seconds = divmod(second, 60)
    hours, minutes = divmod(minutes, 60)
    return f"[Wed Nov 25 {hours:02}:{minutes:02}:{seconds:02} 2026]"


def log(*parts: str, planned: tuple[str, ...] = STAGES, host: str = "node") -> str:
    stats = "\n".join(f"{stage:<12}      1" for stage in planned)
    return HEAD.format(host=host, stats=stats, total=len(planned) + 1) + "".join(parts)


def until(stage: str) -> list[str]:
    """What a log says of all stages before one, which are done."""
    parts, second = [], 0
    for name in STAGES[: STAGES.index(stage)]:
        parts += [begun(name, second), finished(name, second := second + SECONDS[name])]
    return parts


def put(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def put_log(root: Path, text: str, name: str = "2026-11-25T004539.809877") -> Path:
    return put(root, f".snakemake/log/{name}.snakemake.log", text)


def project(root: Path) -> Path:
    """A project that was not started."""
    put(root, "Snakefile", "")
    put(root, "config/config.yaml", "")
    return root


def done(root: Path, *stages: str) -> None:
    """The manifests of stages."""
    contents = {"plan": {"steps": 400, "peak_gib": 62.4}, "train": {"steps": 400}}
    for stage in stages:
        put(root, str(OUTPUTS[stage]), json.dumps({"stage": stage, **contents.get(stage, {})}))


def metrics(steps: int, experts: int = 128) -> str:
    """Lines as the training writes them."""
    lines = []
    for step in range(1, steps + 1):
        wave = math.sin(step * 1.7)
        load = [1 + 0.6 * math.sin(e * 0.9 + step) for e in range(experts)]
        record = {
            "step": step,
            "loss": round(1.1 + 1.4 * math.exp(-step / 60) + 0.05 * wave, 6),
            "learning_rate": 1e-4 * min(1, step / 12) * (1 - step / 500),
            "grad_norm": 0.5,
            "tokens": 16384,
            "trained_tokens": 4096,
            "seconds": round(9.2 + 0.3 * wave, 4),
            "tokens_per_s": round(16384 / (9.2 + 0.3 * wave), 1),
            "memory_gib": round(61.9 - 2 / step, 3),
            "expert_load": [round(share / sum(load), 5) for share in load],
        }
        lines.append(json.dumps(record) + "\n")
    return "".join(lines)


def this_process_runs(root: Path, stage: str) -> float:
    """Let this very process be the owner of a stage's lock; returns when it began."""
    started = psutil.Process().create_time()
    owner = lock.Owner(stage, os.uname().nodename, os.getpid(), started, None)
    put(root, f"locks/{stage}.owner", json.dumps(asdict(owner)))
    return started


def training(root: Path) -> float:
    """A project whose training is at step 240 of 400; returns when its process began."""
    project(root)
    done(root, *STAGES[:5])
    put_log(root, log(*until("train"), begun("train", 169), host=os.uname().nodename))
    put(root, "results/metrics.jsonl", metrics(240))
    words = "".join(
        f"train: step {n} of 400  loss {1.1 + 20 / (n + 20):.4f}  1780 tokens/s\n"
        for n in range(40, 241, 10)
    )
    put(root, "logs/train.log", "train: on H200 (nvidia-smi lists it); 400 steps\n" + words)
    return this_process_runs(root, "train")


def processes_in(root: Path) -> list[psutil.Process]:
    """What runs in a project and has not ended."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == root and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
