"""Stage plan: what the run takes in memory and on disk, from shapes alone, before it is started.

Every estimate stands beside its formula. Sizes are in bytes inside, in GiB where a user reads them.
The device's memory is at its fullest in one of three moments: the loss, one layer's backward pass,
or the optimizer's step. What is held throughout counts always, of the moments the largest.

Letters: T tokens of a micro-step, H hidden, L layers, E experts, K experts a token, I expert width,
S shared width, V vocabulary, A heads, D their dimensions, Q/R ranks, r LoRA rank, P adapter
parameters, b bytes of the compute dtype.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ms4 import spec
from ms4.config import Preset, RunConfig
from ms4.device import GIB, DeviceKind, find_device
from ms4.errors import Ms4Error
from ms4.manifest import read_manifest, write_manifest
from ms4.weights import layouts
from ms4.weights.schedule import as_published
from ms4.weights.shards import table_bytes

PLAN = Path("results/plan.json")

COMPUTE_BYTES: Mapping[DeviceKind, int] = {"cuda": 2, "cpu": 4}
"""Bytes of the dtype that is computed in: BF16 on CUDA; on a CPU FP32, which is faster there."""
NF4_BLOCK = 64
"""Weights that share one absmax code, as `weights/base/` stores them."""
ABSMAX_BLOCK = 256
"""Absmax codes that share one FP32 scale."""
EXPERT_SLICE = 64
"""Experts that are dequantized at once: 4-bit kernels count elements in int32."""
PROCESS_BYTES: Mapping[DeviceKind, int] = {"cpu": GIB // 2, "cuda": 3 * GIB // 4}
"""What the process takes before the first tensor. CPU: Python, torch, transformers and peft took
0.39 GiB. CUDA: context and cuBLAS workspaces, commonly 0.5 to 0.7 GiB."""
CUDA_HOST_BYTES = 3 * GIB
"""Host memory of a process that trains on CUDA: Python, torch and the CUDA libraries."""
MARGIN = 0.05
"""Share that an allocator loses to rounding and fragmentation. Of all but the base's weights: those
are allocated once, in large pieces, and are never freed."""


@dataclass(frozen=True)
class Plan:
    """The sizes of a run, in bytes."""

    components: Mapping[str, int]
    """What lies in the device's memory at the fullest moment; sums to `peak`."""
    moment: str
    """Which moment that is: `loss`, `backward` or `optimizer`."""
    host: int
    """Host RAM of the training process; on the CPU this holds the components too."""
    disk: int
    """Source, base, checkpoints and adapter."""

    @property
    def peak(self) -> int:
        """The device's memory at the fullest moment."""
        return sum(self.components.values())


@dataclass(frozen=True)
class Proposal:
    """Changes of the configuration that make a run fit."""

    changes: tuple[str, ...]
    config: RunConfig
    plan: Plan


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


# Weights.


# A search for what would fit plans the same model some hundred times.
_tensors = lru_cache(maxsize=16)(spec.tensors)
_parameters = lru_cache(maxsize=16)(spec.parameters_by_role)
_freed_peak = lru_cache(maxsize=16)(lambda dims, to: as_published(dims, to, free=True).peak())
_source_bytes = lru_cache(maxsize=16)(lambda dims: table_bytes(spec.disk_tensors(dims)))


def nf4_bytes(shape: tuple[int, ...]) -> int:
    """An expert projection [E, out, in] in NF4: E · (n/2 codes + ⌈n/64⌉ absmax codes
    + 4 · ⌈blocks/256⌉ scales + 4 for the offset), n = out · in."""
    experts, numel = shape[0], math.prod(shape[1:])
    blocks = math.ceil(numel / NF4_BLOCK)
    return experts * (math.ceil(numel / 2) + blocks + 4 * math.ceil(blocks / ABSMAX_BLOCK) + 4)


@lru_cache(maxsize=32)
def expert_bytes(dims: spec.Dimensions, experts: str) -> int:
    """All routed experts: NF4 as `nf4_bytes` has it, or 2 bytes a weight."""
    return sum(
        nf4_bytes(tensor.shape) if experts == "nf4" else 2 * tensor.numel
        for tensor in _tensors(dims)
        if tensor.role == "experts"
    )


def weights(config: RunConfig, dims: spec.Dimensions, kind: DeviceKind) -> dict[str, int]:
    """The base by part: b bytes a weight, but for the routed experts."""
    count, width = _parameters(dims), COMPUTE_BYTES[kind]
    return {
        f"routed experts ({config.model.experts})": expert_bytes(dims, config.model.experts),
        "attention": width * count["attention"],
        "shared experts": width * count["shared"],
        "embedding and head": width * (count["embedding"] + count["head"]),
        "router and norms": width * (count["router"] + count["norm"]),
        "vision": width * (count["vision"] + count["projector"]),
    }


@lru_cache(maxsize=64)
def adapter_parameters(dims: spec.Dimensions, target: Preset, rank: int) -> int:
    """LoRA parameters of a target: r · (in + out) for each matrix, of each expert its own."""
    return rank * sum(
        math.prod(tensor.shape[:-2]) * sum(tensor.shape[-2:])
        for tensor in _tensors(dims)
        if tensor.role == target
    )


def _adapters(config: RunConfig, dims: spec.Dimensions) -> int:
    return sum(
        adapter_parameters(dims, preset, config.adapters.rank_of(preset))
        for preset in config.adapters.presets
    )


# Activations.


def layer_saved(dims: spec.Dimensions, tokens: int, width: int) -> int:
    """What one layer keeps for its backward pass, beside its input.

    Attention: T·b·(H normed + 2Q + A·D q + A·D rotated + R+rope + R + A·(nope+value) + A·D k
    + 2·A·value for v and out + 2H).
    Experts: T·b·(K·(H rows + 2I gate_up + 2I activation and product + 2H down and weighted)
    + 4S shared + 2H).
    FP32: T·4·(2 norms · 2H + 2E router).
    """
    H, K, I = dims.hidden, dims.experts_per_token, dims.expert_width  # noqa: E741
    heads, S = dims.heads, dims.expert_width * dims.shared_experts
    low_rank = 2 * dims.q_rank + 2 * dims.kv_rank + dims.rope
    attention = 3 * H + low_rank + heads * (3 * dims.head + dims.nope + 3 * dims.value)
    moe = K * (3 * H + 4 * I) + 4 * S + 2 * H
    return tokens * (width * (attention + moe) + 4 * (4 * H + 2 * dims.experts))


def layer_gradients(config: RunConfig, dims: spec.Dimensions, tokens: int, width: int) -> int:
    """Gradients that live at once in one layer's backward pass: T·b·(K·(2H + 3I) + 2H), and the
    layer's adapters cast to the compute dtype, P/L·b."""
    rows = dims.experts_per_token * (2 * dims.hidden + 3 * dims.expert_width)
    cast = width * _adapters(config, dims) // dims.layers
    return tokens * width * (rows + 2 * dims.hidden) + cast


def expert_scratch(config: RunConfig, dims: spec.Dimensions, width: int) -> int:
    """Experts in the compute dtype: min(E, 64) · 3·H·I weights (gate_up and down) of b bytes, and
    16 a block for its absmax (index, code, scale and product). BF16 on CUDA needs none of it."""
    if config.model.experts == "bf16" and width == 2:
        return 0
    numel = min(dims.experts, EXPERT_SLICE) * 3 * dims.hidden * dims.expert_width
    absmax = 16 * math.ceil(numel / NF4_BLOCK) if config.model.experts == "nf4" else 0
    return numel * width + absmax


def plan(config: RunConfig, dims: spec.Dimensions, kind: DeviceKind) -> Plan:
    """The sizes of the run that `config` describes, on a device of a kind.

    T = micro_batch · sequence_length: bins are planned as full.
    """
    width, train = COMPUTE_BYTES[kind], config.train
    tokens = train.micro_batch * config.data.sequence_length
    trained = _adapters(config, dims)
    base = weights(config, dims, kind)
    held = {
        "adapters": 4 * trained,
        "gradients": 4 * trained,
        "optimizer state": 8 * trained,  # AdamW's two moments, FP32
        "layer inputs": dims.layers * tokens * dims.hidden * width,
        # Boolean, and once more in the compute dtype as attention's bias.
        "block mask": tokens * config.data.sequence_length * (1 + width),
        # The head's input, its gradient, and that scaled: taken in the loss, used in backward.
        "head's hidden states": tokens * dims.hidden * 3 * width,
        "process": PROCESS_BYTES[kind],
    }
    saved = layer_saved(dims, tokens, width)
    everything = train.checkpointing == "none"
    live = dims.layers if everything else 1
    kept = live * saved if everything else 0  # when the loss is computed
    chunk, logit_bytes = min(train.loss_chunk, tokens), 4 * 2 + (width if width < 4 else 0)
    moments = {
        # Logits of a chunk and their gradient in FP32, and one of them in a narrower dtype.
        "loss": {"layer activations": kept, "loss chunk": chunk * dims.vocabulary * logit_bytes},
        "backward": {
            "layer activations": live * saved,
            "layer gradients": layer_gradients(config, dims, tokens, width),
            "dequantized experts": expert_scratch(config, dims, width),
        },
        # The fused update's denominators, FP32, one for each parameter.
        "optimizer": {"optimizer temporaries": 4 * trained},
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    moving = {**held, **moments[moment]}
    components = {**base, **moving, "allocator margin": math.ceil(MARGIN * sum(moving.values()))}
    base_disk = expert_bytes(dims, config.model.experts) + 2 * sum(
        count for role, count in _parameters(dims).items() if role != "experts"
    )
    # Two checkpoints are kept while a third is written: adapter and two moments, FP32.
    written = base_disk + 3 * 12 * trained + 4 * trained
    if config.model.free_source:  # shards come and go before anything is trained
        disk = max(_freed_peak(dims, config.model.experts), written)
    else:
        disk = _source_bytes(dims) + written
    # Beside the libraries: the base's largest piece and a checkpoint, each on its way.
    piece = max(base_disk // dims.layers, 4 * dims.vocabulary * dims.hidden)
    host = CUDA_HOST_BYTES + piece + 12 * trained if kind == "cuda" else sum(components.values())
    return Plan(
        {name: size for name, size in components.items() if size}, moment, host=host, disk=disk
    )


# What to change when it does not fit.


Change = tuple[str, dict[str, Any], str]
"""A section of the configuration, its new values, and what they cost."""


def _changed(config: RunConfig, section: str, **values: Any) -> RunConfig:
    part = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: part})


def _changes(config: RunConfig, longest: int) -> Iterator[Change]:
    """Single changes in the order of what they cost: time, then exactness, then what is learned."""
    train, adapters = config.train, config.adapters
    if train.checkpointing == "none":
        yield "train", {"checkpointing": "full"}, "a third more compute"
    if train.micro_batch > 1:
        sequences = train.micro_batch * train.accumulation
        yield "train", {"micro_batch": 1, "accumulation": sequences}, "the same steps, slower"
    if train.loss_chunk > 256:
        yield "train", {"loss_chunk": 256}, "a little slower"
    if config.model.experts == "bf16":
        yield "model", {"experts": "nf4"}, "rounds the experts"
    half = config.data.sequence_length // 2
    if half >= max(longest, 16):
        yield "data", {"sequence_length": half}, f"the longest sample has {longest} tokens"
    rest = tuple(preset for preset in adapters.presets if preset != "experts")
    if rest and rest != adapters.presets:
        fewer: dict[str, Any] = {"targets": rest}
        if adapters.expert_rank is not None:
            fewer["expert_rank"] = None
        yield "adapters", fewer, "routed experts stay as they are"
    ranks = {"rank": adapters.rank, "expert_rank": adapters.expert_rank}
    less = {name: 8 if r > 8 else max(1, r // 2) for name, r in ranks.items() if r is not None}
    if any(less[name] != ranks[name] for name in less):
        yield "adapters", less, "adapters that can hold less"


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
    changes: dict[str, dict[str, Any]] = {
        "train": {"checkpointing": "full", "micro_batch": 1, "loss_chunk": 1},
        "data": {"sequence_length": min(config.data.sequence_length, max(16, longest))},
        "adapters": {"rank": 1, "expert_rank": None, "targets": (target,)},
    }
    found = []
    # BF16 experts need no scratch on CUDA, which can be less for a model of few layers.
    for experts in ("nf4", "bf16"):
        changes["model"] = {"experts": experts}
        small = config
        for section, values in changes.items():
            small = _changed(small, section, **values)
        texts = tuple(_told(*change) for change in changes.items())
        found.append(Proposal(texts, small, plan(small, dims, kind)))
    return min(found, key=lambda proposal: proposal.plan.peak)


def proposals(
    config: RunConfig, dims: spec.Dimensions, kind: DeviceKind, longest: int, budget: int
) -> list[Proposal]:
    """Changes after which the run fits, each planned again: single ones, else pairs,
    else more at once, else everything at its least."""
    single = list(_changes(config, longest))
    for number in range(1, len(single) + 1):
        found = []
        for group in itertools.combinations(single, number):
            changed = config
            for section, values, _ in group:
                changed = _changed(changed, section, **values)
            new = plan(changed, dims, kind)
            if new.peak <= budget:
                found.append(Proposal(tuple(_told(*change) for change in group), changed, new))
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
    found = proposals(config, dims, kind, longest, budget)
    if found:
        lines.append("In the configuration, any one of these makes it fit, the cheapest first:")
        lines += [f"  - {' and '.join(p.changes)}: {size(p.plan.peak)}" for p in found[:6]]
    else:
        lines.append(
            f"No change of the configuration makes it fit: this model needs at least "
            f"{size(least(config, dims, kind, longest).plan.peak)} of {where}, in micro-steps of "
            "one sequence and with adapters of rank 1. Use a device with more memory."
        )
    return Ms4Error("\n".join(lines))


# The stage.


def size(amount: int) -> str:
    """Bytes as GiB, small ones as MiB."""
    return f"{amount / GIB:.1f} GiB" if amount >= GIB else f"{amount / 2**20:.1f} MiB"


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


def run_stage(config: RunConfig) -> None:
    """Plan the run and write `results/plan.json`.

    Raises:
        Ms4Error: it does not fit; the message says what would.
    """
    data_path, source_path = Path("results/data.json"), Path("weights/source.json")
    data = read_manifest(data_path, "preprocess")["train"]
    source = read_manifest(source_path, "fetch")
    dims = layouts.read_dimensions(Path(source["directory"]), source.get("layout", "hf"))
    device = find_device(config)
    configured = config.run.memory_gib
    budget = int(configured * GIB) if configured is not None else device.free
    planned = plan(config, dims, device.kind)
    if planned.peak > budget:
        raise does_not_fit(config, dims, device.kind, data["longest"], budget)
    steps = total_steps(config, data["bins"])
    batch = config.train.micro_batch * config.train.accumulation
    tokens_per_step = round(data["tokens"] / max(data["bins"], 1) * batch)
    show(planned, f"{device.name} ({device.reason})", budget)
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
        components={name: round(amount / GIB, 6) for name, amount in planned.components.items()},
        moment=planned.moment,
        peak_gib=round(planned.peak / GIB, 6),
        host_gib=round(planned.host / GIB, 6),
        disk_gib=round(planned.disk / GIB, 6),
        steps=steps,
        tokens_per_step=tokens_per_step,
    )
