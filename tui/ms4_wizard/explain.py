"""Why each value is what it is, in words for the project's files.

Everything here follows from the answers alone, not from the machine or the day: the same answers
give the same bytes.
"""

from __future__ import annotations

from ms4 import memory
from ms4.config import RunConfig
from ms4.device import GIB
from ms4.memory import size
from ms4_wizard.answers import Answers
from ms4_wizard.costs import Cost
from ms4_wizard.steps import QUESTIONS


def count(parameters: float) -> str:
    """A number of parameters in the unit that a person would use."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.3g} {letter}"
    return f"{parameters:g}"


def value_of(config: RunConfig, field: str) -> object:
    """The value of a dotted field."""
    value: object = config
    for name in field.split("."):
        value = getattr(value, name)
    return value


def notes(answers: Answers, found: Cost) -> dict[str, str]:
    """Dotted field → a sentence on the value that was chosen.

    Args:
        answers: the answers.
        found: their plan, as `costs.standing` makes it.
    """
    told: dict[str, str] = {}
    for field, question in QUESTIONS.items():
        if field.startswith("where."):
            continue
        value = value_of(answers, field)
        meanings = {choice.value: choice.meaning for choice in question.choices}
        if question.form == "choice" and value in meanings:
            told[field] = f"{meanings[str(value)]}."
    told |= _figures(answers, found)
    return {field: f"Here: {text}" for field, text in told.items()}


def _figures(answers: Answers, found: Cost) -> dict[str, str]:
    dims, config = found.dims, found.config
    adapters, train, data = answers.adapters, answers.train, answers.data
    kinds = {
        preset: memory.adapter_parameters(dims, preset, adapters.rank_of(preset))
        for preset in adapters.presets
    }
    sequences = train.micro_batch * train.accumulation
    held = memory.expert_bytes(dims, answers.model.experts)
    routed = memory.parameters(dims)["experts"]
    of = "" if found.budget is None else f" of {size(found.budget)}"
    kept = {
        "full": "each layer is computed again",
        "selective": "the cheap parts of each layer are computed again",
        "none": "nothing is computed again",
    }
    policy = f"{kept[config.train.checkpointing]}."
    if train.checkpointing == "auto":
        policy = "decided when the run starts, by the memory that there is."
    steps = (
        f"{train.steps:,} steps, whatever the epochs say."
        if train.steps is not None
        else f"every sample is seen {train.epochs:g} {'time' if train.epochs == 1 else 'times'}."
    )
    told = {
        "model.experts": f"{size(held)} for {count(routed)} weights of routed experts.",
        "adapters.targets": ", ".join(f"{k} {count(n)} parameters" for k, n in kinds.items()) + ".",
        "adapters.rank": f"{count(sum(kinds.values()))} trained parameters, with all targets.",
        "adapters.alpha": "scale "
        + ", ".join(f"{adapters.scaling(k):g} on {k}" for k in adapters.presets)
        + ".",
        "data.sequence_length": f"{sequences} sequences of {data.sequence_length:,}: at most "
        f"{sequences * data.sequence_length:,} tokens a step.",
        "train.micro_batch": f"{train.micro_batch * data.sequence_length:,} tokens at once; the "
        f"plan is {found.plan.peak / GIB:.2f} GiB{of} at its fullest, on "
        f"{'a GPU' if found.kind == 'cuda' else 'a CPU'}.",
        "train.accumulation": f"{train.micro_batch} × {train.accumulation} = {sequences} sequences "
        "a step.",
        "train.learning_rate": f"{train.learning_rate:g} after a warm-up of "
        f"{100 * train.warmup:g} % of the steps.",
        "train.epochs": steps,
        "train.checkpointing": policy,
        "evaluate.max_samples": f"{len(data.test)} held-out "
        f"{'set' if len(data.test) == 1 else 'sets'}, each answered by the untuned and the tuned "
        f"model in {len(answers.evaluate.efforts)} "
        f"{'effort' if len(answers.evaluate.efforts) == 1 else 'efforts'}.",
        "run.memory_gib": "not given: the plan takes what the device has."
        if answers.run.memory_gib is None
        else f"the plan needs {found.plan.peak / GIB:.2f} GiB of it at its fullest.",
    }
    if "experts" in kinds:
        rank = adapters.rank_of("experts")
        told["adapters.expert_rank"] = f"{rank}: {count(kinds['experts'])} parameters."
    if not answers.evaluate.min_exact_match:
        told["evaluate.min_exact_match"] = "none: the report gives figures and no verdict."
    return told
