"""The plan against the account of the real training step at full size, on the way of CUDA."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ms4 import config, memory, spec
from ms4.model import stores
from tests.parity.accounting import META, account, full_size

FULL = spec.Dimensions()
GIB = 2**30
SETS = {"dense": ("attention", "shared"), "all": ("all",), "attention": ("attention",)}
LENGTHS, POLICIES = (2048, 8192, 16384), ("full", "selective", "none")


def settings(length, targets, policy, *, adapters=None, model=None, **train):
    return config.check(
        {
            "data": {"train": ["train.jsonl"], "sequence_length": length},
            "model": model or {},
            "adapters": {"targets": SETS[targets], **(adapters or {})},
            "train": {"checkpointing": policy, **train},
        },
        "test",
    )


def agree(run):
    counted = full_size(run)
    planned = memory.plan(run, FULL, "cuda")
    # What no counting of tensors shows is left out: the process, and the margin for fragmentation.
    assert planned.tensors == pytest.approx(counted.peak, rel=0.03)
    rest = counted.peak - counted.weights
    assert planned.tensors - planned.weights == pytest.approx(rest, rel=0.10)
    # 512 bytes are the rotary frequencies.
    assert planned.weights == pytest.approx(counted.weights, abs=1024)
    return counted, planned


def cases():
    """All 27; each pair of length, set and policy is among the nine of the ordinary run."""
    for i, length in enumerate(LENGTHS):
        for j, targets in enumerate(SETS):
            for k, policy in enumerate(POLICIES):
                rare = () if (i + j + k) % 3 == 0 else pytest.mark.soak
                yield pytest.param(length, targets, policy, marks=rare)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "targets", "policy"), cases())
def test_plan_and_account_agree(length, targets, policy):
    agree(settings(length, targets, policy))


OTHERS = {
    "no accumulation": {"accumulation": 1},
    "8-bit": {"optimizer": "adamw_8bit"},
    "micro-batch": {"micro_batch": 4},
    "small chunk": {"loss_chunk": 128},
    "bf16 adapters": {"adapters": {"dtype": "bf16"}, "optimizer": "adamw_8bit"},
    "bf16 adapters, fp32 moments": {"adapters": {"dtype": "bf16"}},
    "bf16 experts": {"model": {"experts": "bf16"}},
    "fp8 experts": {"model": {"experts": "fp8"}},
    "rank of experts": {"adapters": {"expert_rank": 5, "rank": 64}},
    "offload": {"offload_activations": True},
    "dropout": {"adapters": {"dropout": 0.1}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_plan_and_account_agree_on(name):
    agree(settings(4096, "all", "full", **OTHERS[name]))


@pytest.mark.slow
def test_dropout_without_checkpointing():
    agree(settings(2048, "dense", "none", adapters={"dropout": 0.1}))


LEAN = {"adapters": {"dtype": "bf16"}, "optimizer": "adamw_8bit"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("targets", "length", "most"),
    [("dense", 2048, 63), ("dense", 8192, 66), ("all", 2048, 77), ("all", 8192, 79)],
)
def test_the_peaks_that_are_promised(targets, length, most):
    """With the vision tower. The routed experts' adapters alone have 2 G parameters at rank 32:
    they are held in BF16, their moments in 8 bits; the dense ones need neither."""
    counted, planned = agree(
        settings(length, targets, "full", **(LEAN if targets == "all" else {}))
    )
    assert counted.peak <= planned.peak <= most * GIB


@pytest.mark.slow
def test_layers_held_in_full():
    agree(settings(2048, "dense", "full", model={"dense": "full"}))


@pytest.mark.slow
def test_a_step_grows_by_the_same_with_each_layer():
    """What the extrapolation to 36 layers rests on."""
    run = settings(2048, "all", "selective")
    few = account(run, replace(FULL, layers=2))[0]
    more = account(run, replace(FULL, layers=3))[0]
    six = account(run, replace(FULL, layers=6))[0]
    assert few.extrapolate(more, (2, 3), 6) == six


def test_the_account_sees_what_comes_and_goes():
    from tests.parity.accounting import Accountant

    with Accountant() as counted:
        kept = torch.empty(1000, device=META)
        view = kept.view(10, 100)
        assert counted.live == 4000
        twice = view * 2
        assert counted.live == 8000
        del twice
        assert counted.live == 4000
        kept.add_(1)
        assert (counted.live, counted.peak) == (4000, 8000)
        del kept
        assert counted.live == 4000  # the view holds it
        del view
        assert counted.live == 0


def test_slices_are_those_of_the_code():
    assert stores.Workspace.on(META).experts == memory.EXPERT_SLICE
    assert stores.CPU_BYTES == memory.CPU_SLICE_BYTES
