"""The load of the experts is what the routers chose, and counting it changes no number."""

import json

import pytest
import torch

from ms4 import config
from ms4.cli import run_stage
from ms4.model import experts, stores
from ms4.train.batches import collate, loss_sum

from .conftest import settings
from .test_checkpointing import POLICIES, build, gradients
from .test_model import documents


@pytest.mark.parametrize(("policy", "offload"), POLICIES)
def test_shares_are_those_of_the_routers_choices(bases, monkeypatch, policy, offload):
    model = build(bases, torch.device("cpu"), policy, offload)
    chosen, forward = [], experts.experts_forward

    def noted(module, hidden, routes, weights):
        chosen.append(routes)
        return forward(module, hidden, routes, weights)

    monkeypatch.setitem(experts.ALL_EXPERTS_FUNCTIONS, experts.IMPLEMENTATION, noted)
    loss_sum(model, collate([documents([50, 30]), documents([70], 1)]), 64).backward()
    rows = torch.cat([routes.reshape(-1) for routes in chosen]).bincount(minlength=8)
    found = experts.take_load(model)
    assert found == pytest.approx((rows / rows.sum()).tolist(), abs=1e-7)
    assert len(set(found)) > 1
    # Taken is taken: the next step begins at nothing.
    assert experts.take_load(model) == []


def test_counting_changes_no_number(bases, monkeypatch):
    counted = gradients(build(bases, torch.device("cpu"), "full", False), torch.device("cpu"))
    monkeypatch.setattr(stores.Workspace, "count", lambda self, ends: None)
    model = build(bases, torch.device("cpu"), "full", False)
    plain = gradients(model, torch.device("cpu"))
    assert experts.take_load(model) == [], "it was not counted"
    assert all(torch.equal(a, b) for a, b in zip(counted, plain, strict=True))


def test_no_rows_are_no_load():
    workspace = stores.Workspace()
    workspace.count([0, 0])
    assert workspace.take_load() == []
    workspace.count([1, 4])
    workspace.count([0, 4])
    assert workspace.take_load() == [0.125, 0.875]


def test_every_step_writes_it_down(project, checkpoint):
    line = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (project / "train.jsonl").write_text(f"{json.dumps(line)}\n" * 4)
    values = settings(checkpoint).model_dump(mode="json")
    values["train"] |= {"steps": 2, "accumulation": 1}
    for stage in ("preprocess", "plan", "train"):
        run_stage(stage, config.check(values, "test"))
    records = list(map(json.loads, (project / "results/metrics.jsonl").read_text().splitlines()))
    assert len(records) == 2
    for record in records:
        assert len(record["expert_load"]) == 8
        assert sum(record["expert_load"]) == pytest.approx(1, abs=1e-4)
