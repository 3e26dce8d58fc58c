"""The full architecture on one GPU: peak memory and speed, planned and measured.

    python benchmarks/gpu.py [--minutes M] [--record FILE] [--memory GIB]
    python benchmarks/gpu.py --size tiny --device cpu     a model of no interest, to try it

Random weights are made straight into the packed stores on the device, then one configuration after
the other trains for some steps: ms4's, and beside it a plain stack over the same tensors (see
`stacks.py`). What is measured is added to the record after each, so that a call may end at any
time; the next one goes on with what is missing. A configuration that does not fit is recorded as
such. The most telling ones come first: nine minutes are enough for a table.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

import stacks
from common import RECORDS, machine
from ms4 import config, memory, spec, throughput
from ms4.config import Checkpointing, Preset, RunConfig
from ms4.device import GIB, DeviceKind, Gpu, gpus_called
from ms4.manifest import read_json, write_json
from ms4.model.stores import CUDA_EXPERTS
from ms4.train.metrics import memory_gib

CLAIM = (
    "One step of the full-size model, rank 32, micro-batch 1, every position trained, for ms4 and "
    "for transformers with bitsandbytes-parametrized experts, grouped_mm and PEFT, whose adapters "
    "are held as ms4's are."
)
ADAPTERS: dict[str, tuple[Preset, ...]] = {
    "dense": ("attention", "shared"),
    "all": ("attention", "shared", "experts"),
}
LEAST_STEPS, MOST_STEPS, ENOUGH_S = 2, 10, 6.0
"""Steps that are timed: at least two, then until they took so many seconds."""
FIRST_STEPS = 2
"""Steps before: memory is taken, kernels are chosen."""
Stack = Literal["ours", "plain"]


@dataclass(frozen=True)
class Case:
    """A configuration that is measured."""

    stack: Stack
    length: int
    """Tokens of the one sequence of a step."""
    adapters: str
    """`dense` (attention and shared experts) or `all` (the routed experts too)."""
    policy: Checkpointing = "full"
    experts: int = CUDA_EXPERTS
    """Of a slice that is dequantized at once; ms4's only."""

    @property
    def name(self) -> str:
        """In words."""
        told = f"{self.stack}: T {self.length}, {self.adapters}, checkpointing {self.policy}"
        return told + (f", slices of {self.experts} experts" if self.stack == "ours" else "")

    def config(self) -> RunConfig:
        """The run. Experts have 2 G adapter parameters at rank 32: BF16, their moments in 8 bits;
        the dense layers' are FP32 and have FP32 moments."""
        lean = self.adapters == "all"
        return config.check(
            {
                "data": {"train": ["none.jsonl"], "sequence_length": self.length},
                "adapters": {
                    "targets": list(ADAPTERS[self.adapters]),
                    "rank": 32,
                    "dtype": "bf16" if lean else "fp32",
                },
                "train": {
                    "micro_batch": 1,
                    "accumulation": 1,
                    "checkpointing": self.policy,
                    "optimizer": "adamw_8bit" if lean else "adamw",
                },
            },
            "the benchmark",
        )


@dataclass(frozen=True)
class Size:
    """A model, and what it is measured at."""

    dims: spec.Dimensions
    lengths: tuple[int, int, int]
    slices: tuple[int, ...]
    """Experts of a slice; the second is what the other configurations take."""


SIZES = {
    "full": Size(spec.Dimensions(), (2048, 8192, 16384), (8, CUDA_EXPERTS, 32, 64)),
    "tiny": Size(replace(spec.TINY, expert_width=128), (32, 64, 128), (2, 4, 8)),
}


def cases(lengths: tuple[int, int, int], slices: tuple[int, ...]) -> Iterator[Case]:
    """All configurations, the most telling first; ms4's and the plain stack's in turn."""
    stacks_: tuple[Stack, Stack] = ("ours", "plain")
    for length in lengths:
        for adapters in ADAPTERS:
            for stack in stacks_:
                yield Case(stack, length, adapters, experts=slices[1])
    policies: tuple[Checkpointing, Checkpointing] = ("selective", "none")
    for length in lengths:
        for policy in policies:
            for adapters in ADAPTERS:
                yield Case("ours", length, adapters, policy, slices[1])
    for length in lengths[:2]:
        for experts in slices:
            if experts != slices[1]:
                yield Case("ours", length, "dense", experts=experts)
    yield Case("plain", lengths[0], "dense", "none")


@dataclass(frozen=True)
class Setting:
    """What all configurations of a run share."""

    dims: spec.Dimensions
    device: torch.device
    dtype: torch.dtype
    state: stacks.State
    room: float
    """Memory of the device in GiB."""
    gpu: Gpu | None
    """The table's entry for it."""

    @property
    def kind(self) -> DeviceKind:
        """Of the device, as plans call it."""
        return "cuda" if self.device.type == "cuda" else "cpu"


def prepare(dims: spec.Dimensions, device: torch.device, room: float | None) -> Setting:
    """Make the weights.

    Args:
        dims: sizes of the model.
        device: that computes.
        room: GiB that may be taken; None: what the device has.
    """
    gpu = None
    if device.type == "cuda":
        own = torch.cuda.mem_get_info()[1] / GIB
        name = torch.cuda.get_device_name()
        gpu = next(iter(gpus_called(name)), None)
    else:
        own = machine()["memory_gib"]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    started = time.perf_counter()
    state = stacks.random_weights(dims, device, dtype, "fp8")
    synchronize(device)
    size = sum(tensor.nbytes for tensor in state.values()) / GIB
    print(f"weights: {size:.2f} GiB in {time.perf_counter() - started:.1f} s", flush=True)
    return Setting(dims, device, dtype, state, room if room is not None else own, gpu)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def clean(device: torch.device) -> None:
    """Give back what the last configuration held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def planned(case: Case, setting: Setting) -> dict[str, float]:
    """What the plan and the table of ceilings say of one of ms4's configurations, in GiB."""
    run, dims = case.config(), setting.dims
    # On a CPU too: it is CUDA's way that is tried there.
    run = run.model_copy(update={"model": run.model.model_copy(update={"dense": "fp8"})})
    found = memory.plan(run, dims, setting.kind)
    # The plan has slices of a fixed size; of others the scratch differs, and its rows.
    more = 0.0
    if setting.kind == "cuda" and case.experts != CUDA_EXPERTS:
        share = min(case.experts, dims.experts) / min(CUDA_EXPERTS, dims.experts) - 1
        rows = case.length * dims.experts_per_token / dims.experts * CUDA_EXPERTS
        more = share * memory.expert_scratch(run, dims, "cuda")
        more += share * rows * 2 * (dims.hidden + 6 * dims.expert_width)
    figures = {
        "planned_gib": round((found.peak + more) / GIB, 3),
        # Of it what is measured: torch's allocator sees tensors, a process's memory is all.
        "planned_seen_gib": round(
            ((found.tensors if setting.kind == "cuda" else found.peak) + more) / GIB, 3
        ),
    }
    if setting.gpu is not None:
        speed = throughput.estimate(run, dims, setting.gpu).tokens_per_s
        figures["estimated_tokens_per_s"] = round(speed)
    return figures


def build(case: Case, setting: Setting) -> stacks.Ours | stacks.Plain:
    """The training step of a configuration."""
    run, dims, device, dtype = case.config(), setting.dims, setting.device, setting.dtype
    if case.stack == "plain":
        model = stacks.plain_model(setting.state, dims, device, dtype, run.adapters)
        return stacks.Plain(model, run.train)
    model = stacks.packed_model(setting.state, dims, device, dtype, "fp8")
    model.model.language_model.layers[0].mlp.experts.workspace.experts = case.experts
    return stacks.Ours(model, dims, run.adapters, run.train)


def idle_bytes(case: Case, setting: Setting) -> int:
    """On the device, but of no use to this configuration: the plain stack has dense layers of its
    own in place of the codes."""
    if case.stack == "ours":
        return 0
    return sum(
        tensor.nbytes
        for name, tensor in setting.state.items()
        if name.endswith((".codes", ".scale_inv")) and tensor.device.type == "cuda"
    )


def train(case: Case, setting: Setting) -> dict[str, Any]:
    """Train for some steps; the figures of the configuration."""
    trained = build(case, setting)
    generator = torch.Generator().manual_seed(1)

    def tokens() -> torch.Tensor:
        return torch.randint(1000, setting.dims.vocabulary, (case.length,), generator=generator)

    losses, seconds = [], []
    for _ in range(FIRST_STEPS):
        losses.append(trained.step(tokens()))
    while len(seconds) < LEAST_STEPS or (len(seconds) < MOST_STEPS and sum(seconds) < ENOUGH_S):
        row = tokens()
        synchronize(setting.device)
        started = time.perf_counter()
        losses.append(trained.step(row))
        synchronize(setting.device)
        seconds.append(time.perf_counter() - started)
    peak = memory_gib(setting.device) - idle_bytes(case, setting) / GIB
    # After the clock: it needs gradients, which a step does not leave.
    trained.backward(tokens())
    dead, count = stacks.without_gradient(trained.model)
    middle = sorted(seconds)[len(seconds) // 2]
    found: dict[str, Any] = {
        "peak_gib": round(peak, 3),
        "tokens_per_s": round(case.length / middle, 1),
        "seconds": [round(s, 4) for s in seconds],
        "losses": [round(loss, 4) for loss in losses],
        "adapter_tensors_without_gradient": f"{dead} of {count}",
    }
    if setting.device.type == "cuda":
        found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
    return found


def measure(case: Case, setting: Setting) -> dict[str, Any]:
    """The figures of a configuration, or why there are none."""
    figures: dict[str, Any] = planned(case, setting) if case.stack == "ours" else {}
    if figures.get("planned_gib", 0) > setting.room:
        why = f"the plan is {figures['planned_gib']:.1f} GiB, the device has {setting.room:.1f}"
        return {**figures, "outcome": "skipped", "why": why}
    clean(setting.device)
    try:
        figures |= {"outcome": "measured", **train(case, setting)}
    except torch.OutOfMemoryError as error:
        figures |= {"outcome": "out of memory", "why": first_line(error)}
    except (RuntimeError, ValueError, TypeError) as error:
        # A fault of one way, of a kernel that this device lacks say, is a finding too; the next
        # call tries it again.
        figures |= {"outcome": "failed", "why": f"{type(error).__name__}: {first_line(error)}"}
    return figures


def first_line(error: Exception) -> str:
    """What an exception says, at most 300 characters."""
    return (str(error).splitlines() or [""])[0][:300]


# The record.


def session(device: torch.device) -> dict[str, Any]:
    """When, where and with what this call measures."""
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    found = {"date": today, "device": device.type, **machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_gib": round(properties.total_memory / GIB, 2),
            "cuda": torch.version.cuda,
        }
    return found


def read_record(path: Path) -> dict[str, Any]:
    """What was measured before, or an empty record."""
    if path.exists():
        found: dict[str, Any] = read_json(path)
        return found
    return {"claim": CLAIM, "command": "python benchmarks/gpu.py", "sessions": [], "cases": []}


def default_record(size: str, device: torch.device) -> Path:
    """Of each GPU its own: figures of two are no comparison."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    kind = "".join(c if c.isalnum() else "-" for c in name.lower())
    return RECORDS / f"gpu-{kind}{'' if size == 'full' else f'-{size}'}.json"


def line(row: dict[str, Any]) -> str:
    """A row of the record for people."""
    name = Case(**row["case"]).name
    if row["outcome"] != "measured":
        return f"{name}: {row['outcome']}: {row['why']}"
    plan = f" (planned {row['planned_seen_gib']:.2f})" if "planned_seen_gib" in row else ""
    speed = f"{row['tokens_per_s']:,.0f} tokens/s"
    if "estimated_tokens_per_s" in row:
        speed += f" (estimated {row['estimated_tokens_per_s']:,})"
    dead = row["adapter_tensors_without_gradient"]
    told = "" if dead.startswith("0 ") else f"; {dead} adapter tensors get no gradient"
    return f"{name}: {row['peak_gib']:.2f} GiB{plan}, {speed}{told}"


def ratios(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Plain over ms4's where both were measured in one session."""
    keys = ("length", "adapters", "policy", "stack")
    measured = {
        (row["session"], *(row["case"][key] for key in keys)): row
        for row in reversed(rows)  # of several slices the first
        if row["outcome"] == "measured"
    }
    for (*key, stack), row in measured.items():
        other = measured.get((*key, "plain"))
        if stack == "ours" and other is not None:
            faster = row["tokens_per_s"] / other["tokens_per_s"]
            smaller = other["peak_gib"] / row["peak_gib"]
            yield (
                f"T {key[1]}, {key[2]}, checkpointing {key[3]}: {faster:.2f} times as fast as the "
                f"plain stack, which takes {smaller:.2f} times the memory"
            )


def main(arguments: list[str]) -> int:
    """Measure what the record lacks until the time is up; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing that ends later")
    parser.add_argument("--memory", type=float, help="GiB that may be taken; all, if not given")
    parser.add_argument("--record", type=Path, help="a file to add to")
    given = parser.parse_args(arguments)
    begun = time.perf_counter()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("gpu: torch sees no CUDA device; `--size tiny --device cpu` tries this without one.")
        return 2
    warnings.filterwarnings("ignore", message=r"(?s).*LoRA parametrization")
    device = torch.device(given.device)
    path = given.record or default_record(given.size, device)
    record = read_record(path)
    record["cases"] = [row for row in record["cases"] if row["outcome"] != "failed"]
    size = SIZES[given.size]
    done = [row["case"] for row in record["cases"]]
    missing = [case for case in cases(size.lengths, size.slices) if asdict(case) not in done]
    if missing:
        setting = prepare(size.dims, device, given.memory)
        record["sessions"].append(session(device))
    longest = 0.0
    for case in missing:
        started = time.perf_counter()
        if longest and started - begun + 1.5 * longest > 60 * given.minutes:
            break
        print(f"{case.name} …", flush=True)
        row = {"case": asdict(case), "session": len(record["sessions"]) - 1}
        row |= measure(case, setting)
        record["cases"].append(row)
        write_json(path, record)
        print(line(row), flush=True)
        clean(device)
        synchronize(device)  # where a fault broke the device this ends the call: nothing is lost
        longest = max(longest, time.perf_counter() - started)
    print(f"\n{path}")
    for row in record["cases"]:
        print(line(row))
    for text in ratios(record["cases"]):
        print(text)
    left = len(missing) + len(done) - len(record["cases"])
    failed = sum(row["outcome"] == "failed" for row in record["cases"])
    if failed:
        print(f"{failed} failed, as their lines say: the same command tries them again.")
    print(f"{left} are missing: the same command goes on." if left else "Nothing is missing.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
