"""One training step on the CPU at a middle size: ms4 against a plain stack of common libraries.

    python benchmarks/step.py [--pairs N] [--threads N] [--tiny]

Plain: transformers' Trainer and its cross-entropy, experts parametrized by bitsandbytes and
multiplied by `grouped_mm`, PEFT's adapters (see `stacks.py`). Both train the same tensors on the
same tokens in the same dtype, each position has a target, adapters are FP32, the optimizer is
torch's fused AdamW. Steps are timed in turn in one process: each of the Trainer's is followed by
one of ours. Memory is measured in a process of its own for each.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import stacks
from common import record, spread
from ms4 import spec
from ms4.config import AdaptersSection, Checkpointing, Preset, TrainSection
from ms4.model.module import IGNORED

MIDDLE = replace(
    spec.Dimensions(),
    hidden=512,
    expert_width=256,
    experts=32,
    layers=4,
    heads=8,
    q_rank=256,
    kv_rank=128,
    nope=32,
    rope=32,
    value=64,
    vision_layers=1,
    vision_hidden=64,
    vision_heads=1,
    vision_width=128,
)
TINY = replace(spec.TINY, expert_width=128)
"""Whole groups of blocks: bitsandbytes counts them through all experts."""
LENGTH, RANK = 1024, 32
CPU = torch.device("cpu")
CLAIM = (
    "A step of training with adapters on the experts takes half the time of the plain stack's or "
    "less, and half its memory above what is resident after loading, or less."
)


@dataclass(frozen=True)
class Case:
    """What is compared."""

    targets: tuple[Preset | Literal["all"], ...]
    policy: Checkpointing
    trained: float = 1.0
    """Share of the positions that are targets."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation."""
    plain_dtype: Literal["bfloat16"] | None = None
    """Of the plain stack's, if it is another: transformers loads a checkpoint in its own dtype, and
    ms4 computes in FP32 on a CPU."""

    def __str__(self) -> str:
        own = f"{self.dtype} against plain {self.plain_dtype}" if self.plain_dtype else self.dtype
        return (
            f"adapters on {' and '.join(self.targets)}, checkpointing {self.policy}, "
            f"{100 * self.trained:.0f} % trained, {own}"
        )

    @property
    def adapters(self) -> AdaptersSection:
        """In FP32 for both, as is PEFT's default."""
        return AdaptersSection(targets=self.targets, rank=RANK, alpha=2.0 * RANK)


DENSE: tuple[Preset, ...] = ("attention", "shared")
CASES = (
    Case(("all",), "full"),
    Case(DENSE, "full"),
    Case(("all",), "none"),
    Case(DENSE, "none"),
    Case(("all",), "full", 0.5),
    Case(DENSE, "full", 0.5),
    Case(("all",), "full", dtype="bfloat16"),
    Case(("all",), "full", plain_dtype="bfloat16"),
)


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


class Documents(Dataset[dict[str, torch.Tensor]]):
    """Random tokens, of which a share are targets: the last ones, as of an answer."""

    def __init__(self, vocabulary: int, count: int, length: int, trained: float) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(1000, vocabulary, (count, length), generator=generator)
        self.labels = self.tokens.clone()
        self.labels[:, : round(length * (1 - trained))] = IGNORED

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def clocks() -> tuple[float, float]:
    """Seconds of wall and of this process's CPU time."""
    return time.perf_counter(), time.process_time()


def since(started: tuple[float, float]) -> tuple[float, float]:
    """Seconds since `clocks`."""
    wall, cpu = clocks()
    return wall - started[0], cpu - started[1]


class Steps(TrainerCallback):  # type: ignore[misc]
    """Notes the seconds of each of the Trainer's steps, and calls a function after each."""

    def __init__(self, after: Callable[[int], object]) -> None:
        self.after, self.done = after, 0
        self.seconds: list[tuple[float, float]] = []
        """Wall and CPU."""
        self.dead: tuple[int, int] = (0, 0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The clock starts."""
        self.started = clocks()

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Which tensors would learn in the second step, when every A should have a gradient."""
        if self.done == 1:
            self.dead = stacks.without_gradient(model)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The clock stops."""
        self.seconds.append(since(self.started))
        self.done += 1
        self.after(self.done - 1)


def run_trainer(model: Any, data: Documents, policy: str, steps: Steps) -> float:
    """Train on each document with transformers' Trainer; the mean loss."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory,
            per_device_train_batch_size=1,
            max_steps=len(data),
            learning_rate=TrainSection().learning_rate,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=policy == "full",
            gradient_checkpointing_kwargs={"use_reentrant": False},
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            # Both stacks meet the same document at a time.
            train_sampling_strategy="sequential",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[steps])
        return float(trainer.train().training_loss)


def compare(case: Case, dims: spec.Dimensions, length: int, pairs: int) -> dict[str, Any]:
    """Steps of both in turn, after one of each that is not counted."""
    data = Documents(dims.vocabulary, pairs + 1, length, case.trained)
    train, dtype = TrainSection(checkpointing=case.policy), _dtype(case.dtype)
    state = stacks.random_weights(dims, CPU, dtype, "full")
    plain = stacks.plain_model(
        state, dims, CPU, _dtype(case.plain_dtype or case.dtype), case.adapters
    )
    model = stacks.packed_model(state, dims, CPU, dtype, "full")
    ours = stacks.Ours(model, dims, case.adapters, train)
    seconds, losses = [], []

    def after(number: int) -> None:
        started = clocks()
        losses.append(ours.step(data.tokens[number], data.labels[number]))
        seconds.append(since(started))

    steps = Steps(after)
    loss = run_trainer(plain, data, case.policy, steps)
    found: dict[str, Any] = {}
    # Beside other work the wall's clock tells of that; a thread that waits busily counts as CPU.
    for clock, name in enumerate(("seconds", "cpu_seconds")):
        a = [pair[clock] for pair in steps.seconds[1:]]
        b = [pair[clock] for pair in seconds[1:]]
        found[f"plain_{name}"], found[f"ours_{name}"] = spread(a), spread(b)
        found[f"plain_over_ours_{name}"] = spread([x / y for x, y in zip(a, b, strict=True)])
    return {
        **found,
        "mean_loss": {"ours": round(statistics.mean(losses), 4), "plain": round(loss, 4)},
        "plain_tensors_without_gradient": f"{steps.dead[0]} of {steps.dead[1]}",
    }


def resident() -> tuple[int, int]:
    """MiB of this process in memory now and at the most since the peak was set back."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, most = (int(fields[name].split()[0]) // 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def child(name: str, case: Case, dims: spec.Dimensions, length: int) -> None:
    """Three steps of one stack; prints MiB at the most above what was resident after loading."""
    dtype, data = _dtype(case.dtype), Documents(dims.vocabulary, 3, length, case.trained)
    state = stacks.random_weights(dims, CPU, dtype, "full")
    ours = plain = None
    if name == "ours":
        model = stacks.packed_model(state, dims, CPU, dtype, "full")
        ours = stacks.Ours(model, dims, case.adapters, TrainSection(checkpointing=case.policy))
    else:
        plain = stacks.plain_model(
            state, dims, CPU, _dtype(case.plain_dtype or case.dtype), case.adapters
        )
    del state
    gc.collect()
    # What loading took and gave back would be taken again before new memory: back to the system.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    loaded, _ = resident()
    if ours is not None:
        for tokens, labels in zip(data.tokens, data.labels, strict=True):
            ours.step(tokens, labels)
    else:
        run_trainer(plain, data, case.policy, Steps(lambda _: None))
    print(json.dumps({"loaded_mib": loaded, "above_mib": resident()[1] - loaded}))


def memory(case: Case, options: list[str]) -> dict[str, Any]:
    """Peak memory of both, each in a process of its own."""
    found: dict[str, Any] = {}
    for name in ("ours", "plain"):
        command = [sys.executable, __file__, "--child", name, str(CASES.index(case)), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-4000:])
        found[name] = json.loads(done.stdout.splitlines()[-1])
    ours, plain = (found[name]["above_mib"] for name in ("ours", "plain"))
    return {**found, "plain_over_ours": round(plain / max(ours, 1), 2)}


def main() -> None:
    """Measure each case, and record it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="of steps that are timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a model of no interest, to try it")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message=r"(?s).*LoRA parametrization")
    torch.set_num_threads(given.threads)
    dims, length = (TINY, 64) if given.tiny else (MIDDLE, LENGTH)
    if given.child:
        name, number = given.child
        child(name, CASES[int(number)], dims, length)
        return
    options = ["--threads", str(given.threads), *(["--tiny"] if given.tiny else [])]
    result: dict[str, Any] = {"threads": given.threads, "tokens": length, "rank": RANK}
    for case in CASES:
        print(case, flush=True)
        found = {
            "time": compare(case, dims, length, given.pairs),
            "memory": memory(case, options),
        }
        result[str(case)] = found
        print(json.dumps(found, indent=2), flush=True)
    if not given.tiny:
        record("step", CLAIM, result)


if __name__ == "__main__":
    main()
