"""The training loop itself, through its stage: what its parts are tested for elsewhere, it uses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ms4 import config
from ms4.cli import run_stage
from ms4.errors import Ms4Error
from ms4.model import lora
from ms4.train import loop, metrics

from .conftest import relative, settings

LENGTHS = ((1, 15), (12, 1), (2, 9), (5, 10), (1, 1), (3, 14), (10, 4), (3, 3))
"""Words of each question and of its answer: bins are filled, and trained, very differently."""


@pytest.fixture
def planned(project, checkpoint):
    """The project with eight packed documents; gives a run of other settings, planned."""
    lines = []
    for question, answer in LENGTHS:
        said = [("user", "why " * question), ("assistant", "so " * answer)]
        turns = [{"role": role, "content": text.strip()} for role, text in said]
        lines.append(json.dumps({"messages": turns}) + "\n")
    (project / "train.jsonl").write_text("".join(lines))
    values = settings(checkpoint).model_dump(mode="json")
    values["data"] |= {"packing": "none"}
    values["adapters"] |= {"targets": ["all"], "rank": 4}
    values["train"] |= {"micro_batch": 1, "accumulation": 1, "steps": 3}

    def run(**train):
        made = config.check(values | {"train": values["train"] | train}, "test")
        run_stage("plan", made)
        return made

    run_stage("preprocess", config.check(values, "test"))
    return run


def losses():
    return [json.loads(line)["loss"] for line in metrics.METRICS.read_text().splitlines()]


def test_four_batches_of_one_are_one_batch_of_four(planned, monkeypatch):
    """Protects the normalizer of a step: all its trained tokens, and not each batch's own. By
    those, a token of a short answer would weigh more the fewer share its batch."""
    # Plain steps: Adam's, and clipped ones, would hide what all gradients are multiplied by.
    monkeypatch.setattr(
        loop.optim, "make", lambda train, chosen: torch.optim.SGD(chosen, lr=train.learning_rate)
    )
    made = []
    for micro_batch, accumulation in ((1, 4), (4, 1)):
        some = {"micro_batch": micro_batch, "accumulation": accumulation, "max_grad_norm": 1e6}
        run_stage("train", planned(steps=2, learning_rate=0.01, warmup=0.0, **some))
        made.append((losses(), load_file(loop.ADAPTER / "adapter_model.safetensors")))
        metrics.METRICS.unlink()
    (one, ones), (four, fours) = made
    assert one == pytest.approx(four, rel=1e-5)
    assert ones.keys() == fours.keys()
    for name, found in ones.items():
        assert relative(found, fours[name]) < 1e-5, name


@pytest.mark.parametrize(
    ("factor", "step"), [("mlp.experts.down_lora.B", 1), ("self_attn.q_a_proj.lora_A", 2)]
)
def test_a_run_whose_adapter_is_dead_stops(planned, monkeypatch, factor, step):
    """Protects the loop's own call of `assert_adapters_learn`, in the first step for B and in the
    second for A as well; nothing is saved."""
    add = lora.add_adapters

    def add_dead(model, adapters, dims):
        matches = add(model, adapters, dims)
        for name, parameter in lora.trainable(model).items():
            if name.endswith(factor):
                parameter.register_hook(torch.zeros_like)
        return matches

    monkeypatch.setattr(lora, "add_adapters", add_dead)
    with pytest.raises(Ms4Error, match=rf"step {step}: 4 of 80 adapter tensors .*{factor}"):
        run_stage("train", planned())
    assert len(losses()) == step - 1
    assert not loop.ADAPTER.exists()
    assert not loop.OUTPUT.exists()


def test_what_adapters_matched_is_printed(planned, monkeypatch, capsys):
    """Protects the table of each preset's tensors and parameters, before the first step."""
    monkeypatch.setenv("COLUMNS", "120")
    capsys.readouterr()
    run_stage("train", planned(steps=1))
    shown = capsys.readouterr().out
    rows = [line.replace("│", " ").split() for line in shown.splitlines() if "│" in line]
    found = {row[0]: (int(row[1]), int(row[4]), row[5]) for row in rows}
    adapter = json.loads(Path("results/train.json").read_text())["adapter"]
    assert found == {m["target"]: (4, m["tensors"], f"{m['parameters']:,}") for m in adapter}
    tensors = {name: number for name, (_, number, _) in found.items()}
    assert tensors == {"attention": 40, "shared": 24, "experts": 16}
    total = sum(match["parameters"] for match in adapter)
    assert f"{total:,} adapter parameters, held in fp32." in shown


def test_the_plan_is_compared_with_what_was_measured(planned, monkeypatch, capsys):
    """Protects the line of planned and measured memory: after the second step, when a run of days
    has just begun, and at the end."""
    when, compare = [], loop.compare

    def noted(*arguments):
        when.append(len(losses()))
        return compare(*arguments)

    monkeypatch.setattr(loop, "compare", noted)
    capsys.readouterr()
    run_stage("train", planned())
    assert when == [2, 3]
    assert capsys.readouterr().out.count("train: memory: measured ") == 2
