"""Checkpointing policies: the same losses and gradients, and fewer bytes held, as they say."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ms4 import spec
from ms4.config import AdaptersSection
from ms4.model import checkpointing, lora
from ms4.model.build import load_model
from ms4.train.batches import collate, loss_sum

from .conftest import documents, relative, stir

POLICIES = [
    ("none", False),
    ("full", False),
    ("selective", False),
    ("full", True),
    ("selective", True),
]


def build(bases, device, policy, offload, **changes):
    torch.manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = load_model(bases["nf4"] / "weights/base", "nf4", device, dtype)
    lora.add_adapters(model, AdaptersSection(targets=("all",), rank=5, **changes), spec.TINY)
    checkpointing.apply(model, policy, offload)
    return model.train()


def gradients(model, device):
    """Loss and gradients of one batch, with the random numbers of the same seed."""
    torch.manual_seed(3)
    loss = loss_sum(model, collate([documents([50, 30]), documents([70], 1)]).to(device), 64)
    loss.backward()
    return [loss.detach(), *(p.grad for p in lora.trainable(model).values())]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_policy_gives_the_same_loss_and_gradients(bases, device, dropout):
    results = []
    for policy, offload in POLICIES:
        model = build(bases, device, policy, offload, dropout=dropout)
        stir(model)
        results.append(gradients(model, device))
    for found in results[1:]:
        assert len(found) == 81
        for one, other in zip(found, results[0], strict=True):
            # CUDA's attention adds up its gradients in any order here.
            assert torch.equal(one, other) if device.type == "cpu" else relative(one, other) < 0.02


class Held(TorchDispatchMode):
    """Bytes of the storages that came since and still live."""

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key, size):
        self._seen.discard(key)
        self.live -= size


def saved(model, rows=2, T=120):
    """Bytes held when the loss of a batch is known and its backward pass has not begun."""
    batch = collate([documents([T], seed) for seed in range(rows)])
    with Held() as held:
        loss = loss_sum(model, batch, 64)
        amount = held.live
    loss.backward()
    return amount, rows * T


def test_bytes_are_held_in_the_order_of_the_policies(bases):
    amounts = {}
    for policy in ("full", "selective", "none"):
        amounts[policy], tokens = saved(build(bases, torch.device("cpu"), policy, False))
    dims, width = spec.TINY, 4
    layer = tokens * dims.hidden * width * dims.layers
    assert amounts["full"] < amounts["selective"] < amounts["none"]
    assert amounts["full"] > layer  # and what no policy changes: mask, scratch, head, loss
    # What the module's docstring lists, at the tiny model's sizes: q_a, kv_a, attention, o, gate,
    # up and router; the A's of eight dense adapters of rank 5; attention's sums, one for each head.
    S = dims.expert_width * dims.shared_experts
    kept = dims.q_rank + dims.kv_rank + dims.rope + dims.heads * dims.value + dims.hidden + 2 * S
    extra = tokens * width * dims.layers * (kept + dims.experts + 8 * 5 + dims.heads)
    assert amounts["selective"] - amounts["full"] == pytest.approx(extra, rel=0.005)
    assert amounts["none"] - amounts["full"] > 3 * extra


def test_offload_moves_the_layers_inputs_and_nothing_else(bases, monkeypatch):
    made = []
    attach = checkpointing.Offload.attach
    monkeypatch.setattr(
        checkpointing.Offload,
        "attach",
        lambda self, layer: (made.append(self), attach(self, layer)),
    )
    for policy in ("full", "selective"):
        made.clear()
        model = build(bases, torch.device("cpu"), policy, True)
        _, tokens = saved(model)
        assert [offload.bytes for offload in made] == [tokens * spec.TINY.hidden * 4] * 4


@pytest.mark.gpu
def test_offload_leaves_the_devices_memory(cuda, bases):
    amounts = {}
    for offload in (False, True):
        model = build(bases, cuda, "full", offload)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = loss_sum(model, collate([documents([2000])]).to(cuda), 64)
        amounts[offload] = torch.cuda.memory_allocated() - before
        loss.backward()
    assert amounts[False] - amounts[True] >= spec.TINY.layers * 2000 * spec.TINY.hidden * 2
