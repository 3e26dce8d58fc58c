"""Stage train: one loop from start to end.

Base and adapters → the newest checkpoint, if there is one → steps → the adapter. Killed at any
moment and started again, it ends with the same adapter, bit for bit (same machine, same number
of threads): a step's data follow from its number, the rest is in the checkpoint.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ms4 import spec
from ms4.config import AdaptersSection, RunConfig, TrainSection
from ms4.data.packed import load_packed
from ms4.errors import Ms4Error
from ms4.manifest import check_files, file_entry, read_inputs, sha256_json, write_json
from ms4.manifest import write_manifest as write_stage_manifest
from ms4.model import checkpointing, experts, lora
from ms4.model.build import choose_device, load_model, prepare_torch
from ms4.model.module import PackedLoss
from ms4.plan import compare, total_steps
from ms4.train import metrics, optim, state
from ms4.train.batches import Batches

if TYPE_CHECKING:  # it brings an image library, which text has no use for
    from ms4.data.image_store import ImageStore

BASE = Path("weights/base")
ADAPTER = Path("results/adapter")
IMAGES = Path("data/packed/images.safetensors")
OUTPUT = Path("results/train.json")
MACHINE = Path("results/train_machine.json")
INPUTS = {
    "descale": Path("weights/base.json"),
    "verify": Path("results/verify.json"),
    "preprocess": Path("results/data.json"),
    "plan": Path("results/plan.json"),
}


def learning_rate(step: int, steps: int, train: TrainSection) -> float:
    """Learning rate of optimizer step `step` (from 0) of `steps`.

    Linear warm-up over the first `warmup` share, then constant, or to 0 along a line or a cosine.
    """
    warmup = math.ceil(train.warmup * steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / (warmup + 1)
    left = 1 - (step - warmup) / max(1, steps - warmup)
    factor = {
        "constant": 1.0,
        "linear": left,
        "cosine": 0.5 * (1 - math.cos(math.pi * left)),
    }[train.schedule]
    return train.learning_rate * factor


def assert_adapters_learn(parameters: dict[str, nn.Parameter], step: int) -> None:
    """Every adapter tensor must get a gradient: B from the first step, A from the second (its
    gradient is B's product, and B starts at zero).

    Raises:
        Ms4Error: names the tensors that would never learn.
    """
    dead = [
        name
        for name, parameter in parameters.items()
        if not (step == 0 and lora.is_first_factor(name))
        and (parameter.grad is None or not bool(parameter.grad.count_nonzero()))
    ]
    if dead:
        raise Ms4Error(
            f"step {step + 1}: {len(dead)} of {len(parameters)} adapter tensors get no gradient "
            f"and never learn: {', '.join(dead[:5])}. This is a fault of ms4 or of the installed "
            "peft and transformers, not of the data; nothing was saved."
        )


@contextmanager
def stop_on_sigterm() -> Iterator[list[int]]:
    """A list that is empty until SIGTERM comes: a scheduler's time limit, or `kill`."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_matches(matches: list[lora.Match], adapters: AdaptersSection) -> None:
    table = Table("adapters", "rank", "scaling", "dropout", "tensors", "parameters")
    for match in matches:
        table.add_row(
            match.target,
            str(match.rank),
            f"{adapters.scaling(match.target):.4g}",
            "none" if match.target == "experts" else f"{adapters.dropout:g}",
            str(match.tensors),
            f"{match.parameters:,}",
        )
    Console().print(table)
    total = sum(match.parameters for match in matches)
    print(f"{total:,} adapter parameters, held in {adapters.dtype}.")


def open_images(made: dict[str, Any]) -> ImageStore | None:
    """The images of the data that `preprocess` made, by its manifest; None if it holds none."""
    if not any(entry["path"] == str(IMAGES) for entry in made["files"]):
        return None
    # It brings an image library, which text has no use for.
    from ms4.data.image_store import ImageStore

    return ImageStore(IMAGES)


def run_stage(config: RunConfig) -> None:
    """Train, and write `results/adapter/` and `results/train.json`."""
    manifests = read_inputs(INPUTS, config)
    check_files(manifests["descale"], BASE)
    check_files(manifests["preprocess"], Path())
    data = load_packed(Path("data/packed/train.safetensors"))
    reader = Batches(
        data,
        config.train.micro_batch,
        config.train.accumulation,
        config.seed,
        images=open_images(manifests["preprocess"]),
        grouped=config.data.packing == "length_grouped",
    )
    steps = total_steps(config, data.bins)
    run = sha256_json([config.part("train"), manifests["descale"], manifests["preprocess"], steps])

    device, dtype, why = choose_device(config.run)
    print(f"train: on {why}; {steps} steps")
    optim.check_device(config.train, device)
    prepare_torch(config.run, config.seed)
    dense = config.model.dense_on(device.type)
    model = load_model(BASE, manifests["descale"]["experts"], device, dtype, dense)
    matches = lora.add_adapters(model, config.adapters, spec.read_dimensions(BASE))
    _print_matches(matches, config.adapters)
    policy = config.train.checkpointing
    if policy == "auto":
        policy = manifests["plan"]["checkpointing"]
    checkpointing.apply(model, policy, config.train.offload_activations)
    print(f"train: checkpointing {policy}; {config.train.optimizer}")
    model.train()
    module = PackedLoss(model, config.train.loss_chunk)
    parameters = lora.trainable(model)
    optimizer = optim.make(config.train, parameters.values())
    progress = state.restore(parameters, optimizer, run)
    metrics.keep_until(progress.step)
    if progress.step:
        print(f"train: goes on from the checkpoint of step {progress.step}")

    with stop_on_sigterm() as stop, metrics.Reporter(steps, progress.step) as reporter:
        while progress.step < steps:
            started = time.perf_counter()
            step = progress.step
            rate = learning_rate(step, steps, config.train)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batches = reader.step(step)
            # One normalizer for the whole step: a token weighs the same in whatever batch it is.
            trained = sum(batch.trained for batch in batches)
            total = torch.zeros((), dtype=torch.float64, device=device)
            for batch in batches:
                part = module(batch.to(device)) / max(trained, 1)
                part.backward()
                total += part.detach()
            loss = total.item()
            if not math.isfinite(loss):
                raise Ms4Error(
                    f"step {step + 1}: the loss is {loss}; the last checkpoint is kept. Lower "
                    f"train.learning_rate (it is {config.train.learning_rate:g})."
                )
            if step < 2:
                assert_adapters_learn(parameters, step)
            norm = optim.clip_gradients(parameters.values(), config.train.max_grad_norm)
            if not math.isfinite(norm):
                raise Ms4Error(
                    f"step {step + 1}: the gradients' norm is {norm}; the last checkpoint is kept. "
                    f"Lower train.learning_rate (it is {config.train.learning_rate:g})."
                )
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - started
            progress.step += 1
            progress.trained_tokens += trained
            progress.seconds += seconds
            progress.first_loss = progress.first_loss if step else loss
            progress.last_loss = loss
            tokens = sum(batch.tokens for batch in batches)
            reporter.add(
                {
                    "step": progress.step,
                    "loss": loss,
                    "learning_rate": rate,
                    "grad_norm": norm,
                    "tokens": tokens,
                    "trained_tokens": trained,
                    "seconds": round(seconds, 4),
                    "tokens_per_s": round(tokens / seconds, 1),
                    "memory_gib": round(metrics.memory_gib(device), 3),
                    "expert_load": [round(share, 5) for share in experts.take_load(model)],
                }
            )
            due = progress.step % config.train.checkpoint_every == 0 or progress.step == steps
            if due or stop:
                state.save(progress, parameters, optimizer, run)
            if progress.step in (2, steps):
                found = compare(manifests["plan"], metrics.memory_gib(device))
                print(f"train: {found}", flush=True)
            if stop:
                raise Ms4Error(
                    f"stopped by SIGTERM after step {progress.step}; a checkpoint is saved, the "
                    "same command goes on from it."
                )

    files = lora.save(model, ADAPTER, config.adapters, config.model.source)
    write_json(
        MACHINE,
        {
            "device": why,
            "threads": torch.get_num_threads(),
            "seconds": round(progress.seconds, 1),
            "peak_memory_gib": round(metrics.memory_gib(device), 3),
            "resumed": progress.resumed,
        },
    )
    write_stage_manifest(
        OUTPUT,
        "train",
        config_hash=config.part_hash("train"),
        inputs=INPUTS.values(),
        files=[file_entry(path, Path()) for path in files],
        steps=steps,
        adapter=[vars(match) for match in matches],
        trainable_parameters=sum(match.parameters for match in matches),
        trained_tokens=progress.trained_tokens,
        first_loss=progress.first_loss,
        last_loss=progress.last_loss,
    )
    print(
        f"train: {steps} steps, loss {progress.first_loss:.3f} → {progress.last_loss:.3f}, "
        f"adapter in {ADAPTER}"
    )
