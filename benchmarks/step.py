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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import stacks
from common import record
from ms4 import spec
from ms4.config import AdaptersSection, TrainSection
from ms4.model import checkpointing, lora
from ms4.model.module import Batch, PackedLoss
from ms4.train import optim

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
WAYS = {
    "attention and shared": ("attention", "shared"),
    "all, experts too": ("all",),
}
POLICIES = ("full", "none")
CPU = torch.device("cpu")
CLAIM = (
    "A step of training with adapters on the experts takes half the time of the plain stack's or "
    "less, and half its memory above what is resident after loading, or less."
)


class Ours:
    """ms4's training step."""

    def __init__(self, model: Any, dims: spec.Dimensions, adapters: AdaptersSection, policy: str):
        self.model = model
        lora.add_adapters(model, adapters, dims)
        checkpointing.apply(model.train(), policy, False)  # type: ignore[arg-type]
        train = TrainSection()
        self.parameters = lora.trainable(model)
        self.optimizer = optim.make(train, self.parameters.values())
        self.module = PackedLoss(model, train.loss_chunk)
        self.limit = train.max_grad_norm

    def step(self, tokens: torch.Tensor) -> float:
        """Train on one document; the loss a target."""
        positions, documents = torch.arange(len(tokens))[None], torch.zeros_like(tokens)[None]
        targets = torch.cat([tokens[1:], tokens.new_tensor([-100])])[None]
        batch = Batch.of(tokens[None], positions, documents, targets)
        loss = self.module(batch) / batch.trained
        loss.backward()
        optim.clip_gradients(self.parameters.values(), self.limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


class Documents(Dataset[dict[str, torch.Tensor]]):
    """Random tokens, all of them targets."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Steps(TrainerCallback):  # type: ignore[misc]
    """Notes the seconds of each of the Trainer's steps, and calls a function after each."""

    def __init__(self, after: Callable[[int], object]) -> None:
        self.after, self.seconds, self.done = after, [], 0
        self.dead: tuple[int, int] = (0, 0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The clock starts."""
        self.started = time.perf_counter()

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Which tensors would learn in the second step, when every A should have a gradient."""
        if self.done == 1:
            self.dead = stacks.without_gradient(model)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The clock stops."""
        self.seconds.append(time.perf_counter() - self.started)
        self.done += 1
        self.after(self.done - 1)


def run_trainer(model: Any, tokens: torch.Tensor, policy: str, steps: Steps) -> float:
    """Train on each document with transformers' Trainer; the mean loss."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory,
            per_device_train_batch_size=1,
            max_steps=len(tokens),
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
        )
        trainer = Trainer(
            model=model, args=arguments, train_dataset=Documents(tokens), callbacks=[steps]
        )
        return float(trainer.train().training_loss)


def settings(way: str) -> AdaptersSection:
    """The adapters of a way."""
    return AdaptersSection(targets=WAYS[way], rank=RANK, alpha=2.0 * RANK)


def some_tokens(dims: spec.Dimensions, documents: int, length: int) -> torch.Tensor:
    """Random documents."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1000, dims.vocabulary, (documents, length), generator=generator)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def compare(
    dims: spec.Dimensions, dtype: torch.dtype, way: str, policy: str, pairs: int, length: int
) -> dict[str, Any]:
    """Steps of both in turn, after one of each that is not counted."""
    base = stacks.packed_model(dims, CPU, dtype)
    plain = stacks.plain_model(base, dims, dtype, settings(way))
    ours = Ours(base, dims, settings(way), policy)
    tokens, seconds, losses = some_tokens(dims, pairs + 1, length), [], []

    def after(number: int) -> None:
        started = time.perf_counter()
        losses.append(ours.step(tokens[number]))
        seconds.append(time.perf_counter() - started)

    steps = Steps(after)
    loss = run_trainer(plain, tokens, policy, steps)
    return {
        "ours_seconds": spread(seconds[1:]),
        "plain_seconds": spread(steps.seconds[1:]),
        "plain_over_ours": spread(
            [a / b for a, b in zip(steps.seconds[1:], seconds[1:], strict=True)]
        ),
        "mean_loss": {"ours": round(statistics.mean(losses), 4), "plain": round(loss, 4)},
        "plain_tensors_without_gradient": f"{steps.dead[0]} of {steps.dead[1]}",
    }


def resident() -> tuple[int, int]:
    """MiB of this process in memory now and at the most since the peak was set back."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, most = (int(fields[name].split()[0]) // 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def child(name: str, way: str, policy: str, dtype: str, small: bool) -> None:
    """Three steps of one stack; prints MiB at the most above what was resident after loading."""
    dims, length = (TINY, 64) if small else (MIDDLE, LENGTH)
    kind = getattr(torch, dtype)
    base = stacks.packed_model(dims, CPU, kind)
    tokens = some_tokens(dims, 3, length)
    ours = plain = None
    if name == "ours":
        ours = Ours(base, dims, settings(way), policy)
    else:
        plain = stacks.plain_model(base, dims, kind, settings(way))
    del base
    gc.collect()
    # What loading took and gave back would be taken again before new memory: back to the system.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    loaded, _ = resident()
    if ours is not None:
        for document in tokens:
            ours.step(document)
    else:
        run_trainer(plain, tokens, policy, Steps(lambda _: None))
    print(json.dumps({"loaded_mib": loaded, "above_mib": resident()[1] - loaded}))


def memory(way: str, policy: str, dtype: str, threads: int, small: bool) -> dict[str, Any]:
    """Peak memory of both, each in a process of its own."""
    found: dict[str, Any] = {}
    for name in ("ours", "plain"):
        command = [sys.executable, __file__, "--child", name, way, policy, dtype]
        command += ["--threads", str(threads), *(["--tiny"] if small else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-4000:])
        found[name] = json.loads(done.stdout.splitlines()[-1])
    ours, plain = (found[name]["above_mib"] for name in ("ours", "plain"))
    return {**found, "plain_over_ours": round(plain / max(ours, 1), 2)}


def main() -> None:
    """Measure each way under each policy, and record it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="of steps that are timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a model of no interest, to try it")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="of the computation")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message=r"(?s).*LoRA parametrization")
    torch.set_num_threads(given.threads)
    if given.child:
        child(*given.child, given.tiny)
        return
    dims, length = (TINY, 64) if given.tiny else (MIDDLE, LENGTH)
    result: dict[str, Any] = {"threads": given.threads, "tokens": length, "rank": RANK}
    for dtype in given.dtype:
        for way in WAYS:
            for policy in POLICIES:
                name = f"{dtype}, {way}, checkpointing {policy}"
                print(name, flush=True)
                time_ = compare(dims, getattr(torch, dtype), way, policy, given.pairs, length)
                peak = memory(way, policy, dtype, given.threads, given.tiny)
                result[name] = {"time": time_, "memory": peak}
                print(json.dumps(result[name], indent=2), flush=True)
    if not given.tiny:
        record("step", CLAIM, result)


if __name__ == "__main__":
    main()
