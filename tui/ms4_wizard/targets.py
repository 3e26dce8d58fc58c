"""Machines to plan for: this one, a GPU by its name, or a partition of the cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ms4.device import GPUS, Gpu, gpus_called
from ms4_wizard import machine
from ms4_wizard.draft import Draft
from ms4_wizard.machine import Machine, Partition


@dataclass(frozen=True)
class Target:
    """A machine to plan for."""

    name: str
    meaning: str
    values: Mapping[str, Any]
    """Answers that say so, by field."""

    def is_in(self, draft: Draft) -> bool:
        """Whether the draft's answers say this."""
        return all(draft.get(field) == value for field, value in self.values.items())


USUAL_HOURS = 24
"""What the training job asks for if no answer says otherwise."""

HERE = Target(
    "this machine",
    "what it has when it trains",
    {"run.device": "auto", "run.memory_gib": None, "where.run": "local"},
)


def targets(found: Machine | None) -> tuple[Target, ...]:
    """What can be planned for.

    Args:
        found: this machine; None: it was not looked at yet.
    """
    slurm = found.slurm if found is not None else None
    partitions = slurm.with_gpus if slurm is not None else ()
    return (HERE, *map(_of_partition, partitions), *map(_of_gpu, GPUS))


def _of_gpu(gpu: Gpu) -> Target:
    return Target(
        gpu.name,
        f"{gpu.gib:g} GiB",
        {"run.device": "cuda", "run.memory_gib": gpu.gib},
    )


def _of_partition(partition: Partition) -> Target:
    gpu = known_gpu(partition)
    hours = machine.hours(partition.limit)
    values = {
        "run.device": "cuda",
        "run.memory_gib": gpu.gib if gpu is not None else None,
        "where.run": "slurm",
        "where.partition": partition.name,
        # A job asks for 24 hours unless the answers say otherwise: here it would never start.
        "where.hours": hours if hours is not None and hours < USUAL_HOURS else None,
    }
    limit = f", {partition.limit} at most" if partition.limit is not None else ""
    kinds = ", ".join(partition.gpus)
    return Target(f"Slurm {partition.name}", f"{kinds}{limit}", values)


def known_gpu(partition: Partition) -> Gpu | None:
    """The GPU that its nodes have, as Slurm calls it, the smallest where that fits several."""
    found = [gpu for kind in partition.gpus for gpu in gpus_called(kind)]
    return min(found, key=lambda gpu: gpu.gib, default=None)
