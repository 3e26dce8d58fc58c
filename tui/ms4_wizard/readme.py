"""The README of a project: its own commands, what was chosen, and what that takes."""

from __future__ import annotations

import ms4
from ms4 import throughput
from ms4.device import GIB
from ms4.memory import size, trained_parameters
from ms4_wizard.answers import Answers
from ms4_wizard.costs import Cost
from ms4_wizard.explain import count

START = {
    "local": "All stages run on this machine.",
    "slurm": "Each stage is a Slurm job. Start it on a login node, in tmux or screen; "
    "the cluster's names are in `profiles/slurm/config.yaml`.",
}


def readme(answers: Answers, found: Cost) -> str:
    """The text. It holds no free text of the answers: that is in the YAML alone.

    Args:
        answers: the answers.
        found: their plan, as `costs.standing` makes it.
    """
    profile = answers.where.run
    return f"""# A fine-tuning of Mistral Small 4

Written by `ms4-wizard`, ms4 {ms4.__version__}. All of it may be edited and committed.

```sh
snakemake --profile {profile} -n    # what would run
snakemake --profile {profile}       # from the weights to the report
ms4-wizard watch .              # how far it is, beside it
ms4 summary                     # untuned against tuned, and where the report is
```

{START[profile]} Whatever breaks, the same command goes on from where it was. If Snakemake itself \
was killed: `ms4 resume . --profile {profile}`.

## What was chosen

| | |
|---|---|
{_chosen(answers, found)}
Every setting, with its meaning and why it has its value, is in `config/config.yaml`. Change it \
there, or answer the questions again with `ms4-wizard .`; only the stages that depend on a change \
run again, and what you edited stays.

## What it takes

{_memory(found)}
{_time(answers, found)}
## What appears here

| | |
|---|---|
| `weights/` | the weights as fetched, and the base that is trained on |
| `data/packed/` | the data as tokens |
| `checkpoints/` | the training's state, for going on after a kill |
| `results/adapter/` | the adapter, which loads with PEFT |
| `results/report/report.html` | curves, tables and a record of everything that went in |
| `logs/` | what each stage printed |
"""


def _chosen(answers: Answers, found: Cost) -> str:
    adapters, train = answers.adapters, answers.train
    length = (
        f"{train.steps} steps"
        if train.steps is not None
        else f"{train.epochs:g} {'pass' if train.epochs == 1 else 'passes'} over the data"
    )
    ranks = ", ".join(f"{preset} {adapters.rank_of(preset)}" for preset in adapters.presets)
    trained = trained_parameters(found.config, found.dims)
    thresholds = answers.evaluate.min_exact_match
    held_out = list(answers.data.test)
    if answers.data.holdout:
        held_out.append(f"holdout ({answers.data.holdout:.3g} of the training samples)")
    rows = {
        "method": f"{answers.method}, experts in {answers.model.experts}",
        "adapters": f"rank: {ranks}; alpha {adapters.alpha:g}; {count(trained)} parameters",
        "reasoning": answers.data.reasoning,
        "sequence length": f"{answers.data.sequence_length} tokens",
        "training": f"{length}, {train.micro_batch} × {train.accumulation} sequences a step, "
        f"learning rate {train.learning_rate:g}",
        "held-out sets": ", ".join(held_out) or "none",
        "to reach": ", ".join(f"{name} {share:g}" for name, share in thresholds.items())
        or "no threshold",
    }
    return "".join(f"| {name} | {value} |\n" for name, value in rows.items())


def _memory(found: Cost) -> str:
    """The plan as a table."""
    where = "GPU" if found.kind == "cuda" else "CPU"
    rows = "".join(
        f"| {name} | {amount / GIB:.2f} |\n"
        for name, amount in found.plan.components.items()
        if amount >= GIB / 200
    )
    budget = ""
    if found.budget is not None:
        left = found.budget - found.plan.peak
        budget = f" The budget is {size(found.budget)}: {size(abs(left))} "
        budget += "to spare." if left >= 0 else "short."
    return (
        f"The memory of the {where} that trains, at its fullest ({found.plan.moment}), in GiB; "
        f"what is less than 0.005 is left out.{budget}\n\n| | |\n|---|---:|\n{rows}"
        f"| **at its fullest** | **{found.plan.peak / GIB:.2f}** |\n\n"
        f"Host memory {size(found.plan.host)}, disk {size(found.plan.disk)}. The stage `plan` "
        "makes this again for the machine that it runs on, and stops before anything is trained "
        "that would not fit.\n"
    )


def _time(answers: Answers, found: Cost) -> str:
    """Estimates of time and energy on the GPUs that it fits into."""
    if found.kind == "cpu":
        return ""
    per_step = answers.train.micro_batch * answers.train.accumulation * answers.data.sequence_length
    rows = "".join(
        f"| {e.gpu.name} | {e.tokens_per_s:,.0f} | {e.hours(1_000_000):.2f} | "
        f"{e.kwh(1_000_000):.2f} |\n"
        for e in throughput.table(found.config, found.dims)
        if throughput.fits(e.gpu, found.plan.peak)
    )
    if not rows:
        return ""
    return (
        "Estimates from the makers' published ceilings, none of them measured; "
        f"a step has at most {per_step:,} tokens.\n\n"
        "| GPU that it fits into | tokens/s | hours per million tokens | kWh per million tokens "
        f"|\n|---|---:|---:|---:|\n{rows}"
    )
