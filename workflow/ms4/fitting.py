"""What to change when a run does not fit, cheapest first, and the best for a budget."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ms4 import spec, throughput
from ms4.config import Checkpointing, RunConfig
from ms4.device import GIB, GPUS, DeviceKind
from ms4.errors import Ms4Error
from ms4.memory import Plan, adapter_parameters, plan, size


@dataclass(frozen=True)
class Proposal:
    """Changes of the configuration that make a run fit."""

    changes: tuple[str, ...]
    config: RunConfig
    plan: Plan


Change = tuple[str, dict[str, Any], str]
"""A section of the configuration, its new values, and what they cost."""


def changed(config: RunConfig, section: str, **values: Any) -> RunConfig:
    """The configuration with other values in a section; they are not checked."""
    part = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: part})


def choose_checkpointing(
    config: RunConfig, dims: spec.Dimensions, kind: DeviceKind, budget: int | None
) -> Checkpointing:
    """What `train.checkpointing` comes to: `auto` is the policy that recomputes least of those
    that fit into `budget` bytes, and `full` if none does or nobody knows the budget."""
    if config.train.checkpointing != "auto":
        return config.train.checkpointing
    policies: tuple[Checkpointing, ...] = ("none", "selective")
    if config.train.offload_activations:
        policies = ("selective",)  # what is offloaded are the inputs of what is recomputed
    for policy in policies if budget is not None else ():
        tried = plan(changed(config, "train", checkpointing=policy), dims, kind)
        if budget is not None and tried.peak <= budget:
            return policy
    return "full"


def best(
    config: RunConfig, dims: spec.Dimensions, kind: DeviceKind, budget: int
) -> Proposal | None:
    """The fastest run, by estimate, that learns what is asked and fits; None if none does.

    Method, adapters, ranks, the experts' storage, sequence length and sequences a step stay. What
    is tried is how they are computed: checkpointing, micro-batch, chunk of the loss, optimizer
    states, offload. Of equally fast ones the first wins: FP32 states before 8-bit ones.
    """
    batch = config.train.micro_batch * config.train.accumulation
    divisors = [n for n in range(1, min(batch, 64) + 1) if batch % n == 0]
    gpu = next((gpu for gpu in reversed(GPUS) if budget <= gpu.gib * GIB), GPUS[0])
    optimizers = list(dict.fromkeys([config.train.optimizer, "adamw_8bit"]))
    found: Proposal | None = None
    most = 0.0
    for policy, micro, chunk, optimizer in itertools.product(
        ("none", "selective", "full"), reversed(divisors), (1024, 256), optimizers
    ):
        values = {
            "checkpointing": policy,
            "micro_batch": micro,
            "accumulation": batch // micro,
            "loss_chunk": min(chunk, config.train.loss_chunk),
            "optimizer": optimizer,
            "offload_activations": config.train.offload_activations and policy != "none",
        }
        tried = changed(config, "train", **values)
        speed = throughput.estimate(tried, dims, gpu).tokens_per_s
        if speed <= most:
            continue
        planned = plan(tried, dims, kind)
        if planned.peak <= budget:
            now = config.train.model_dump()
            told = {name: value for name, value in values.items() if value != now[name]}
            texts = (_told("train", told),) if told else ()
            found, most = Proposal(texts, tried, planned), speed
    return found


def _changes(config: RunConfig, longest: int, kind: DeviceKind) -> Iterator[Change]:
    """Single changes in the order of what they cost: time, then exactness, then what is learned."""
    train, adapters = config.train, config.adapters
    if train.checkpointing in ("none", "selective"):
        yield "train", {"checkpointing": "full"}, "a third more compute"
    if train.micro_batch > 1:
        sequences = train.micro_batch * train.accumulation
        yield "train", {"micro_batch": 1, "accumulation": sequences}, "the same steps, slower"
    if train.loss_chunk > 256:
        yield "train", {"loss_chunk": 256}, "a little slower"
    if kind == "cuda" and not train.offload_activations and train.checkpointing != "none":
        yield "train", {"offload_activations": True}, "copies to host memory, a little slower"
    if config.model.experts == "bf16":
        yield "model", {"experts": "fp8"}, "the same values, a little slower"
    if train.optimizer == "adamw":
        yield "train", {"optimizer": "adamw_8bit"}, "rounds the optimizer's moments"
    if adapters.dtype == "fp32":
        yield "adapters", {"dtype": "bf16"}, "rounds the adapters while they train"
    if config.model.experts != "nf4":
        yield "model", {"experts": "nf4"}, "rounds the experts"
    half = config.data.sequence_length // 2
    if half >= max(longest, 16):
        yield "data", {"sequence_length": half}, f"the longest sample has {longest} tokens"
    if "experts" in adapters.presets and adapters.rank_of("experts") > 8:
        yield "adapters", {"expert_rank": 8}, "experts' adapters that can hold less"
    rest = tuple(preset for preset in adapters.presets if preset != "experts")
    if rest and rest != adapters.presets:
        fewer = {"targets": rest, "expert_rank": None}
        if adapters.expert_rank is None:
            del fewer["expert_rank"]
        yield "adapters", fewer, "routed experts stay as they are"
    ranks = {"rank": adapters.rank, "expert_rank": adapters.expert_rank}
    less = {name: 8 if r > 8 else max(1, r // 2) for name, r in ranks.items() if r is not None}
    if any(less[name] != ranks[name] for name in less):
        yield "adapters", less, "adapters that can hold less"


def _compatible(group: tuple[Change, ...]) -> bool:
    """Whether no two of the changes give the same field a value."""
    fields = [(section, name) for section, values, _ in group for name in values]
    return len(set(fields)) == len(fields)


def _told(section: str, values: Mapping[str, Any], cost: str = "") -> str:
    fields = [
        f"{section}.{name}: "
        + (f"[{', '.join(v)}]" if isinstance(v, tuple) else json.dumps(v).strip('"'))
        for name, v in values.items()
    ]
    return " with ".join(fields) + (f" ({cost})" if cost else "")


def least(config: RunConfig, dims: spec.Dimensions, kind: DeviceKind, longest: int) -> Proposal:
    """The smallest run of this model on this data: everything that the configuration can lower."""
    target = min(config.adapters.presets, key=lambda name: adapter_parameters(dims, name, 1))
    train: dict[str, Any] = {"checkpointing": "full", "micro_batch": 1, "loss_chunk": 1}
    if kind == "cuda":
        train["offload_activations"] = True
    train["optimizer"] = "adamw_8bit"
    changes: dict[str, dict[str, Any]] = {
        "train": train,
        "data": {"sequence_length": min(config.data.sequence_length, max(16, longest))},
        "adapters": {"rank": 1, "expert_rank": None, "dtype": "bf16", "targets": (target,)},
    }
    now = config.model_dump()
    found = []
    # BF16 experts need no scratch on CUDA, which can be less for a model of few layers.
    for experts in ("nf4", "bf16"):
        changes["model"] = {"experts": experts}
        small = config
        for section, values in changes.items():
            small = changed(small, section, **values)
        texts = (
            _told(section, {name: x for name, x in values.items() if x != now[section][name]})
            for section, values in changes.items()
        )
        told = tuple(text for text in texts if text)
        found.append(Proposal(told, small, plan(small, dims, kind)))
    return min(found, key=lambda proposal: proposal.plan.peak)


def proposals(
    config: RunConfig, dims: spec.Dimensions, kind: DeviceKind, longest: int, budget: int
) -> list[Proposal]:
    """Changes after which the run fits, each planned again: single ones, else pairs,
    else more at once, else everything at its least."""
    single = list(_changes(config, longest, kind))
    for number in range(1, len(single) + 1):
        found = []
        for group in itertools.combinations(single, number):
            if not _compatible(group):
                continue
            tried = config
            for section, values, _ in group:
                tried = changed(tried, section, **values)
            new = plan(tried, dims, kind)
            if new.peak <= budget:
                found.append(Proposal(tuple(_told(*change) for change in group), tried, new))
        if found:
            return found
    smallest = least(config, dims, kind, longest)
    return [smallest] if smallest.plan.peak <= budget else []


def does_not_fit(
    config: RunConfig, dims: spec.Dimensions, kind: DeviceKind, longest: int, budget: int
) -> Ms4Error:
    """The error that says what is missing and what would help."""
    now = plan(config, dims, kind)
    largest = sorted(now.components.items(), key=lambda item: -item[1])[:4]
    where = "GPU memory" if kind == "cuda" else "RAM"
    lines = [
        f"the run does not fit: it needs {size(now.peak)} of {where}, the budget is "
        f"{size(budget)}{' (run.memory_gib)' if config.run.memory_gib else ''}.",
        "Largest parts: " + ", ".join(f"{name} {size(amount)}" for name, amount in largest) + ".",
    ]
    return Ms4Error("\n".join(lines + advice(config, dims, kind, longest, budget)))


def advice(
    config: RunConfig, dims: spec.Dimensions, kind: DeviceKind, longest: int, budget: int
) -> list[str]:
    """What would make the run fit, cheapest first, in lines."""
    where = "GPU memory" if kind == "cuda" else "RAM"
    found = proposals(config, dims, kind, longest, budget)
    if found:
        head = "In the configuration, any one of these makes it fit, the cheapest first:"
        return [head, *(f"  - {' and '.join(p.changes)}: {size(p.plan.peak)}" for p in found[:6])]
    return [
        f"No change of the configuration makes it fit: this model needs at least "
        f"{size(least(config, dims, kind, longest).plan.peak)} of {where}, in micro-steps of "
        "one sequence and with adapters of rank 1. Use a device with more memory."
    ]
