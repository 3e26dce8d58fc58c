"""What the answers cost: memory on the device that will train, and what would make it fit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from threading import Event
from typing import Any

from ms4 import fitting, plan, spec
from ms4.config import RunConfig, check
from ms4.device import GIB, Device, DeviceKind, find_device, find_gpu
from ms4.errors import Ms4Error
from ms4_wizard.answers import Answers


@dataclass(frozen=True)
class Cost:
    """The plan of a run and what it must fit into."""

    plan: plan.Plan
    kind: DeviceKind
    device: str
    """The device and why it is this one, in words."""
    budget: int | None
    """Bytes; None if nobody knows: a GPU of the cluster, of which nothing was said."""
    config: RunConfig
    """What was planned: with a checkpointing policy in the place of `auto`."""
    dims: spec.Dimensions

    @property
    def fits(self) -> bool | None:
        """Whether the plan fits into the budget; None if that is not known."""
        return None if self.budget is None else self.plan.peak <= self.budget


# nvidia-smi takes up to seconds: it is asked once, and not for each answer or at each key stroke.
_gpu = cache(find_gpu)


@cache
def _look(wanted: str, budget: bool) -> Device | Ms4Error:
    """The device, or why there is none."""
    run = {"device": wanted, "memory_gib": 1 if budget else None}
    try:
        configuration = RunConfig.model_validate({"data": {"train": ["-"]}, "run": run})
        return find_device(configuration, None if wanted == "cpu" else _gpu())
    except Ms4Error as error:
        return error


_KNOWN = Event()


def look_at_the_machine() -> None:
    """Find every device that an answer can name."""
    for wanted in ("auto", "cuda", "cpu"):
        for budget in (False, True):
            _look(wanted, budget)
    _KNOWN.set()


def machine_is_known() -> bool:
    """Whether `cost` answers at once."""
    return _KNOWN.is_set()


def cost(answers: Answers) -> Cost:
    """Plan the run.

    Raises:
        Ms4Error: the model or the device is not to be found.
    """
    configuration = answers.configuration()
    wanted, memory = answers.run.device, answers.run.memory_gib
    budget = None if memory is None else int(memory * GIB)
    kind: DeviceKind
    if answers.where.run == "slurm" and wanted != "cpu":
        kind, name = "cuda", "a GPU of the cluster"
    elif answers.where.run == "slurm":
        kind, name = "cpu", "a node of the cluster"
    else:
        found = _look(wanted, memory is not None)
        if isinstance(found, Ms4Error):
            raise found
        kind, name = found.kind, f"{found.name} ({found.reason})"
        budget = found.free if budget is None else budget
    dims = plan.dimensions(configuration)
    return _planned(configuration, dims, kind, name, budget)


def _planned(
    configuration: RunConfig, dims: spec.Dimensions, kind: DeviceKind, name: str, budget: int | None
) -> Cost:
    policy = plan.choose_checkpointing(configuration, dims, kind, budget)
    configuration = fitting.changed(configuration, "train", checkpointing=policy)
    return Cost(plan.plan(configuration, dims, kind), kind, name, budget, configuration, dims)


def standing(answers: Answers) -> Cost:
    """The plan by the answers alone, whatever this machine is: on a GPU unless they name a CPU.

    Raises:
        Ms4Error: the model is not to be found.
    """
    kind: DeviceKind = "cpu" if answers.run.device == "cpu" else "cuda"
    memory = answers.run.memory_gib
    configuration = answers.configuration()
    budget = None if memory is None else int(memory * GIB)
    name = "a CPU" if kind == "cpu" else "a GPU"
    return _planned(configuration, plan.dimensions(configuration), kind, name, budget)


def storages(answers: Answers, found: Cost) -> dict[str, Cost]:
    """The plan with the experts held in each way, the rest as it is."""
    configuration = answers.configuration()
    return {
        experts: _planned(
            fitting.changed(configuration, "model", experts=experts),
            found.dims,
            found.kind,
            found.device,
            found.budget,
        )
        for experts in ("nf4", "fp8", "bf16")
    }


@dataclass(frozen=True)
class Remedy:
    """The cheapest change of the answers that makes a run fit."""

    values: dict[str, Any]
    """Field → its new value."""
    told: str
    """The change and its price, in words."""
    peak: int
    """Bytes, with it."""


def remedy(answers: Answers, found: Cost, longest: int | None = None) -> Remedy | None:
    """What to change if it does not fit: it takes up to a second. None: it fits, or nothing helps.

    Args:
        answers: the answers.
        found: their cost.
        longest: tokens of the longest sample, if that is known: sequences stay as long.
    """
    if found.budget is None or found.fits:
        return None
    length = answers.data.sequence_length if longest is None else longest
    offers = fitting.proposals(found.config, found.dims, found.kind, length, found.budget)
    if not offers:
        return None
    before, after = found.config.model_dump(mode="json"), offers[0].config.model_dump(mode="json")
    values = {
        f"{section}.{name}": value
        for section in ("model", "data", "adapters", "train")
        for name, value in after[section].items()
        if value != before[section][name]
    }
    # With `auto`, room that becomes free may go into a faster checkpointing: the peak is with that.
    then = answers.configuration()
    for field, value in values.items():
        section, _, name = field.partition(".")
        then = fitting.changed(then, section, **{name: value})
    after_all = _planned(
        check(then.model_dump(mode="json"), "the answers"),
        found.dims,
        found.kind,
        found.device,
        found.budget,
    )
    return Remedy(values, " and ".join(offers[0].changes), after_all.plan.peak)


def refusal(answers: Answers, found: Cost) -> Ms4Error | None:
    """The error of a run that does not fit, with what would help; None if it may."""
    if found.budget is None or found.fits:
        return None
    configuration = answers.configuration()
    error = plan.does_not_fit(
        configuration,
        plan.dimensions(configuration),
        found.kind,
        configuration.data.sequence_length,  # the longest sample is not known yet
        found.budget,
    )
    text = str(error)
    if answers.run.memory_gib is None:
        text += (
            "\nIf another machine trains, say what it has, for example run.device: cuda and "
            "run.memory_gib: 80."
        )
    return Ms4Error(text)


def show(found: Cost) -> None:
    """Print the plan."""
    plan.show(found.plan, found.device, found.budget)
