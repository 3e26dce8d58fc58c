"""Stage plan, and `ms4 plan` outside a project: what a run takes before it is started.

The sizes come from `ms4.memory`, what would help from `ms4.fitting`, the speed from
`ms4.throughput`. No torch: a login node or a laptop plans.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import model_validator
from rich import box
from rich.console import Console
from rich.table import Table

from ms4 import config as configuration
from ms4 import settings, spec, throughput, yaml_text
from ms4.config import RunConfig
from ms4.device import GIB, Device, DeviceKind, find_device
from ms4.errors import Ms4Error
from ms4.fitting import (
    Proposal,
    advice,
    best,
    changed,
    choose_checkpointing,
    does_not_fit,
    proposals,
)
from ms4.manifest import read_manifest, write_manifest
from ms4.memory import Plan, plan, size

__all__ = [
    "Plan",
    "best",
    "choose_checkpointing",
    "compare",
    "does_not_fit",
    "plan",
    "show",
    "size",
    "total_steps",
]

PLAN = Path("results/plan.json")
MILLION = 1_000_000


def total_steps(config: RunConfig, bins: int) -> int:
    """Optimizer steps: `train.steps`, or ⌈epochs · bins / (micro_batch · accumulation)⌉.

    Args:
        config: the configuration.
        bins: packed sequences in the training data.
    """
    if config.train.steps is not None:
        return config.train.steps
    batch = config.train.micro_batch * config.train.accumulation
    return max(1, math.ceil(config.train.epochs * bins / batch))


def dimensions(config: RunConfig) -> spec.Dimensions:
    """The sizes of the model that is trained. A model on a hub is taken for the published one.

    Raises:
        Ms4Error: the local directory holds no such model.
    """
    if config.model.source == "tiny":
        return spec.TINY
    directory = config.resolve_source()
    return spec.Dimensions() if directory is None else spec.read_dimensions(directory)


# Plan and measurement.


@dataclass(frozen=True)
class Comparison:
    """What was planned and what was measured, in GiB."""

    planned: float
    """Of what the measurement can see."""
    measured: float

    @property
    def share(self) -> float:
        """Measured over planned."""
        return self.measured / self.planned

    def __str__(self) -> str:
        return (
            f"memory: measured {self.measured:.2f} GiB at the fullest, planned "
            f"{self.planned:.2f} GiB ({100 * (self.share - 1):+.0f} %)"
        )


def compare(planned: Mapping[str, Any], measured_gib: float) -> Comparison:
    """The plan of the stage beside a measured peak.

    On CUDA the measurement is that of torch's allocator (`torch.cuda.max_memory_allocated`), which
    sees tensors, but neither the process nor what fragmentation loses. On a CPU it is what the
    process has resident at most, and that is the whole plan.

    Args:
        planned: `results/plan.json`.
        measured_gib: the peak after steps with all of their optimizer states, the second say.
    """
    seen = planned["tensors_gib"] if planned["device"] == "cuda" else planned["peak_gib"]
    return Comparison(seen, measured_gib)


# What people see.


def show(planned: Plan, device: str, budget: int | None) -> None:
    """Print a plan as a table.

    Args:
        planned: the plan.
        device: the device that trains, in words.
        budget: bytes that it may take; None: not known.
    """
    console = Console()
    print(f"Device: {device}")
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII2, show_footer=True)
    table.add_column("component", f"peak ({planned.moment})")
    table.add_column("GiB", f"{planned.peak / GIB:.2f}", justify="right")
    for name, amount in planned.components.items():
        table.add_row(name, f"{amount / GIB:.2f}")
    console.print(table)
    room = "Budget: not given."
    if budget is not None:
        left = budget - planned.peak
        room = f"Budget {size(budget)}, {size(abs(left))} {'to spare' if left >= 0 else 'short'}."
    print(f"{room} Host RAM {size(planned.host)}, disk {size(planned.disk)}.")


def _gib(amount: int) -> float:
    return round(amount / GIB, 6)


def _sizes(planned: Plan) -> dict[str, Any]:
    """A plan as it stands in JSON, in GiB."""
    return {
        "components": {name: _gib(amount) for name, amount in planned.components.items()},
        "moment": planned.moment,
        "peak_gib": _gib(planned.peak),
        "tensors_gib": _gib(planned.tensors),
        "host_gib": _gib(planned.host),
        "disk_gib": _gib(planned.disk),
    }


# The stage.


def _resolved(
    config: RunConfig, dims: spec.Dimensions, device: Device, configured: int | None
) -> RunConfig:
    """The configuration with a checkpointing policy in place of `auto`.

    It is chosen by the configured budget or by all of the device's memory, neither of which differs
    from one call to the next; by what is free just now only where that policy would not fit.
    """
    room = configured if configured is not None else device.total
    policy = choose_checkpointing(config, dims, device.kind, room)
    resolved = changed(config, "train", checkpointing=policy)
    if configured is None and plan(resolved, dims, device.kind).peak > device.free:
        policy = choose_checkpointing(config, dims, device.kind, device.free)
        resolved = changed(config, "train", checkpointing=policy)
    return resolved


def run_stage(config: RunConfig) -> None:
    """Plan the run and write `results/plan.json`.

    Raises:
        Ms4Error: it does not fit; the message says what would.
    """
    data_path, source_path = Path("results/data.json"), Path("weights/source.json")
    data = read_manifest(data_path, "preprocess")["train"]
    source = read_manifest(source_path, "fetch")
    from ms4.weights import layouts  # numpy, which the wizard's first frame need not wait for

    dims = layouts.read_dimensions(Path(source["directory"]), source.get("layout", "hf"))
    device = find_device(config)
    configured = config.run.memory_gib
    budget = int(configured * GIB) if configured is not None else device.free
    resolved = _resolved(config, dims, device, None if configured is None else budget)
    planned = plan(resolved, dims, device.kind)
    if planned.peak > budget:
        raise does_not_fit(resolved, dims, device.kind, data["longest"], budget)
    steps = total_steps(config, data["bins"])
    batch = config.train.micro_batch * config.train.accumulation
    tokens_per_step = round(data["tokens"] / max(data["bins"], 1) * batch)
    show(planned, f"{device.name} ({device.reason})", budget)
    print(f"Checkpointing: {resolved.train.checkpointing}.")
    print(f"{steps:,} steps of about {tokens_per_step:,} tokens.")
    write_manifest(
        PLAN,
        "plan",
        config_hash=config.part_hash("plan"),
        inputs=[data_path, source_path],
        device=device.kind,
        device_name=device.name,
        # Whole GiB, and no free memory: neither may differ from one run to the next.
        device_gib=None if device.total is None else round(device.total / GIB),
        budget_gib=configured,
        checkpointing=resolved.train.checkpointing,
        **_sizes(planned),
        steps=steps,
        tokens_per_step=tokens_per_step,
    )


# Outside a project.


class Planned(RunConfig):
    """A configuration to plan: also of what does not run yet."""

    @model_validator(mode="after")
    def _check_across_fields(self) -> Planned:
        RunConfig._check_across_fields(self.model_copy(update={"method": "lora"}))  # type: ignore[operator]
        if self.method == "full" and self.model.experts != "bf16":
            raise ValueError(
                f"method: `full` trains BF16 weights, and model.experts is {self.model.experts}; "
                "set it to bf16"
            )
        return self


def read_question(file: Path | None, overrides: Sequence[str]) -> Planned:
    """The configuration that is asked about: of a file, or the default, with settings over it.

    Raises:
        Ms4Error: the file or a setting is wrong.
    """
    values: dict[str, Any] = {}
    root, where = None, "the settings"
    if file is not None:
        where = str(file)
        values, root = yaml_text.parse(yaml_text.read(file, "configuration file"), where)
    for override in overrides:
        settings.put(values, *settings.read_setting(override, Planned))
    data = values.setdefault("data", {})
    if isinstance(data, dict):
        data.setdefault("train", ["none.jsonl"])  # no data are needed: bins are planned as full
    return configuration.check(values, where, root, Planned)


def answer(
    file: Path | None, overrides: Sequence[str], budget_gib: float | None, as_json: bool
) -> None:
    """Print what a run would take, on a GPU unless `run.device` is `cpu`; nothing is written.

    Args:
        file: a configuration file; None: the full-size model and the defaults.
        overrides: `key=value` over it.
        budget_gib: memory of the device; None: what `run.memory_gib` says, if it does.
        as_json: for programs.

    Raises:
        Ms4Error: the file, a setting or the budget is wrong.
    """
    asked = read_question(file, overrides)
    wanted = budget_gib if budget_gib is not None else asked.run.memory_gib
    if wanted is not None and not 0 < wanted <= 1_048_576:
        raise Ms4Error(f"--budget {wanted}: must be GiB of memory, more than 0.")
    budget = None if wanted is None else int(wanted * GIB)
    dims = dimensions(asked)
    kind: DeviceKind = "cpu" if asked.run.device == "cpu" else "cuda"
    policy = choose_checkpointing(asked, dims, kind, budget)
    config = changed(asked, "train", checkpointing=policy)
    planned = plan(config, dims, kind)
    estimates = throughput.table(config, dims) if kind == "cuda" else []
    if as_json:
        tree = _sizes(planned) | {
            "device": kind,
            "checkpointing": policy,
            "budget_gib": wanted,
            "fits": None if budget is None else planned.peak <= budget,
            "best": _proposal(best(config, dims, kind, budget)) if budget is not None else None,
            "proposals": _proposals(config, dims, kind, planned, budget),
            "estimates": [_estimate(found, config, planned) for found in estimates],
        }
        print(json.dumps(tree, indent=2))
        return
    device = "a GPU" if kind == "cuda" else "a CPU"
    show(planned, f"{device}; checkpointing {policy}", budget)
    if budget is not None:
        fastest = best(config, dims, kind, budget)
        if planned.peak > budget:
            longest = config.data.sequence_length
            print("\n".join(advice(config, dims, kind, longest, budget)))
        elif fastest is not None and fastest.changes:
            print(
                f"The fastest that learns the same in this budget, by estimate: "
                f"{' and '.join(fastest.changes)}: {size(fastest.plan.peak)}."
            )
    if estimates:
        _show_estimates(estimates, planned)


def _proposal(found: Proposal | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"changes": list(found.changes), "peak_gib": _gib(found.plan.peak)}


def _proposals(
    config: RunConfig, dims: spec.Dimensions, kind: DeviceKind, planned: Plan, budget: int | None
) -> list[dict[str, Any] | None]:
    if budget is None or planned.peak <= budget:
        return []
    longest = config.data.sequence_length
    return [_proposal(found) for found in proposals(config, dims, kind, longest, budget)[:6]]


def _estimate(found: throughput.Estimate, config: RunConfig, planned: Plan) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "kind": "estimate",
        "gpu": found.gpu.name,
        "fits": throughput.fits(found.gpu, planned.peak),
        "tokens_per_s": round(found.tokens_per_s),
        "hours_per_million_tokens": round(found.hours(MILLION), 4),
        "kwh_per_million_tokens": round(found.kwh(MILLION), 4),
        "arithmetic": throughput.arithmetic(found),
    }
    if config.train.steps is not None:
        tokens = config.train.steps * config.train.accumulation * found.tokens
        tree |= {"hours": round(found.hours(tokens), 2), "kwh": round(found.kwh(tokens), 2)}
    return tree


def _show_estimates(estimates: Sequence[throughput.Estimate], planned: Plan) -> None:
    console = Console()
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII2)
    for head in ("estimate on", "fits", "tokens/s", "hours/M tokens", "kWh/M tokens"):
        table.add_column(head, justify="left" if head == "estimate on" else "right")
    for found in estimates:
        table.add_row(
            found.gpu.name,
            "yes" if throughput.fits(found.gpu, planned.peak) else "no",
            f"{found.tokens_per_s:,.0f}",
            f"{found.hours(MILLION):.3f}",
            f"{found.kwh(MILLION):.3f}",
        )
    console.print(table)
    print(f"Estimates from published ceilings, none measured. {estimates[0].gpu.name}: ", end="")
    print(throughput.arithmetic(estimates[0]) + ".")
