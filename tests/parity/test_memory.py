"""The plan against the account of the real training step at full size, on the way of CUDA."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ms4 import config, memory, spec
from ms4.model import stores, vision
from tests.parity.accounting import META, Accountant, account, build, full_size, worst

FULL = spec.Dimensions()
GIB = 2**30
SETS = {"dense": ("attention", "shared"), "all": ("all",), "attention": ("attention",)}
LENGTHS, POLICIES = (2048, 8192, 16384), ("full", "selective", "none")


def settings(length, targets, policy, *, adapters=None, data=None, model=None, **train):
    return config.check(
        {
            "data": {"train": ["train.jsonl"], "sequence_length": length, **(data or {})},
            "model": model or {},
            "adapters": {"targets": SETS[targets], **(adapters or {})},
            "train": {"checkpointing": policy, **train},
        },
        "test",
    )


def agree(run, routing=worst):
    counted = full_size(run, routing)
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


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [1, 4, 40, 128], ids=lambda n: f"{n} experts")
def test_any_routing_stays_within_the_plan(chosen):
    """All tokens choose from so many experts."""

    def routing(rows, experts):
        return [rows * min(e + 1, chosen) // chosen for e in range(experts)]

    counted, planned = agree(settings(8192, "dense", "full"), routing)
    assert counted.peak <= planned.peak


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


@pytest.mark.parametrize("side", [1540, 756, 28])
def test_an_image_in_the_vision_tower(monkeypatch, side):
    """One after the other, so that the second finds the first one's features only."""

    def fused(query, key, value, *, attn_mask, scale):
        assert attn_mask is None, "kernels that keep no pairs of patches take no mask"
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, scale=scale)[0]

    monkeypatch.setattr(vision.F, "scaled_dot_product_attention", fused)
    model = build(settings(2048, "dense", "full"), replace(FULL, layers=1))
    images = [torch.empty(3, side, side, dtype=torch.bfloat16, device=META) for _ in range(2)]
    counted = Accountant()
    for tensor in (*model.parameters(), *model.buffers(), *images):
        counted.see(tensor)
    before = counted.live
    with counted:
        counted.restart("images")
        vision.image_outputs(model.model, images, (0, 1))
    patches = (side // FULL.patch) ** 2
    features = patches // FULL.merge**2 * FULL.hidden * 2
    planned = memory.image_tower(FULL, patches, 2) + features
    assert planned == pytest.approx(counted.peak - before, rel=0.03)


def test_images_in_the_plan():
    text, both = (
        memory.plan(settings(4096, "dense", "full", data={"modality": kind}), FULL, "cuda")
        for kind in ("text", "text_vision")
    )
    assert both.components["pixels"] == 4096 * 28 * 28 * 3 * 2
    assert both.peak == text.peak + both.components["pixels"], "the tower is through before"
    # Where nothing else is large, the tower is: 1,540 pixels are 110 patches.
    few = {"modality": "text_vision", "sequence_length": 3072}
    run = settings(3072, "attention", "full", data=few, adapters={"rank": 1}, loss_chunk=1)
    found = memory._moments(run, FULL, "cuda")["images"]
    assert found["vision tower"] == memory.image_tower(FULL, 110**2, 2)
    small = settings(64, "attention", "full", data=few | {"sequence_length": 64})
    assert memory._moments(small, FULL, "cuda")["images"]["vision tower"] == (
        memory.image_tower(FULL, 4 * 64, 2)
    ), "an image has to fit in a sequence"


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
