"""Adapters held in FP32 or BF16: which learn better at small learning rates.

A step moves a weight by about the learning rate. BF16 has 8 bits of precision, so a step of less
than 1/512 of a weight is lost: of A, whose weights are as large as 1/sqrt(in), at once, and of B,
which starts at zero, from some size on. Both kinds start from the same numbers, see the same
batches, compute in FP32 and have FP32 moments; they differ in how the adapter is held. FP32 runs in
which A never moves say what its loss costs. An argument names a checkpoint to start from; without
one the tiny model is made first.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch

from common import make_project, record, run
from ms4 import config as configuration
from ms4 import spec
from ms4.config import AdaptersSection, RunConfig, TrainSection
from ms4.data.dataset import PackedData, load_packed
from ms4.model import lora
from ms4.model.build import load_model
from ms4.train import optim
from ms4.train.batches import Batches, loss_sum

RATES = (1e-5, 3e-5, 1e-4)
WAYS = ("fp32", "bf16", "fp32, A frozen")
STEPS, HELD_OUT = 40, 8
"""Packed sequences that are trained on, one a step, and the next ones, that are not."""
CPU = torch.device("cpu")


def prepare(root: Path, source: str) -> RunConfig:
    """A project with the taught model's base and packed data; the current directory from now on."""
    make_project(root, lambda values: values["model"].update(source=source))
    for stage in ("fetch", "descale", "verify", "preprocess"):
        run(root, "ms4", stage, "--config", "config/config.yaml")
    os.chdir(root)
    return configuration.load(Path("config/config.yaml"))


def train(config: RunConfig, data: PackedData, way: str, rate: float) -> dict[str, float]:
    """Train for some steps at a constant rate; held-out loss before and after, and what moved."""
    torch.manual_seed(0)
    model: Any = load_model(Path("weights/base"), "nf4", CPU, torch.float32)
    dtype: Literal["fp32", "bf16"] = "bf16" if way == "bf16" else "fp32"
    settings = AdaptersSection(targets=("all",), rank=16, alpha=32.0, dtype=dtype)
    lora.add_adapters(model, settings, spec.TINY)
    parameters = lora.trainable(model)
    section = TrainSection(learning_rate=rate)
    trained = {
        name: parameter
        for name, parameter in parameters.items()
        if "frozen" not in way or not lora.is_first_factor(name)
    }
    optimizer = optim.make(section, trained.values())
    started = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    rows = config.train.loss_chunk
    batches = Batches(data, 1, 1, 0)

    @torch.no_grad()
    def held_out() -> float:
        held = [batches.step(STEPS + n)[0] for n in range(HELD_OUT)]
        total = sum(float(loss_sum(model, batch, rows)) for batch in held)
        return total / sum(batch.trained for batch in held)

    before = held_out()
    lost = []
    for step in range(STEPS):
        (batch,) = batches.step(step)
        (loss_sum(model, batch, rows) / batch.trained).backward()
        optim.clip_gradients(parameters.values(), 1.0)
        last = step == STEPS - 1
        if last:
            former = {name: p.detach().clone() for name, p in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
        if last:
            for name, parameter in trained.items():
                lost.append(float((parameter == former[name]).float().mean()))
        for parameter in parameters.values():
            parameter.grad = None

    def moved(first: bool) -> float:
        parts = [
            float((p.detach().float() - started[n].float()).square().mean())
            for n, p in parameters.items()
            if lora.is_first_factor(n) == first
        ]
        return float((sum(parts) / len(parts)) ** 0.5)

    after = held_out()
    return {
        "held-out loss before": round(before, 5),
        "held-out loss after": round(after, 5),
        "fall": round(before - after, 5),
        "A moved by (RMS)": float(f"{moved(True):.3g}"),
        "B moved by (RMS)": float(f"{moved(False):.3g}"),
        "weights that the last step left as they were": round(sum(lost) / len(lost), 4),
    }


def main() -> None:
    """Train each way at each rate and record what was learned."""
    source = str(Path(sys.argv[1]).resolve()) if len(sys.argv) > 1 else "tiny"
    torch.set_num_threads(1)  # at this size a second one only waits
    with tempfile.TemporaryDirectory() as directory:
        config = prepare(Path(directory) / "project", source)
        data = load_packed(Path("data/packed/train.safetensors"))
        result = {
            f"learning rate {rate:g}": {way: train(config, data, way, rate) for way in WAYS}
            for rate in RATES
        }
        os.chdir("/")
    claim = "Adapters held in FP32 learn more than ones held in BF16 at small learning rates."
    record("adapter_dtype", claim, {"steps": STEPS, **result})


if __name__ == "__main__":
    main()
