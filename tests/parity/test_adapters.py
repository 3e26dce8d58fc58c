"""Adapters: what they match, that they learn, and that PEFT loads what is saved."""

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open

from ms4 import spec
from ms4.config import AdaptersSection
from ms4.errors import Ms4Error
from ms4.model import lora
from ms4.model.build import load_model
from ms4.train.batches import collate, loss_sum
from ms4.train.loop import assert_adapters_learn

from .conftest import relative
from .test_model import documents, reference

CPU = torch.device("cpu")
ALL = ("attention", "shared", "experts")


def adapted(bases, kind="bf16", targets=ALL, rank=5, alpha=8.0):
    torch.manual_seed(0)
    model = load_model(bases[kind] / "weights/base", kind, CPU, torch.float32)
    settings = AdaptersSection(targets=targets, rank=rank, alpha=alpha)
    return model, settings, lora.add_adapters(model, settings, spec.TINY)


def stir(model):
    """Non-zero B: an adapter that does something."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in lora.trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.mark.parametrize(
    ("targets", "tensors"),
    [(("attention",), [40]), (("shared",), [24]), (("experts",), [16]), (ALL, [40, 24, 16])],
)
def test_matches(bases, targets, tensors):
    model, _, matches = adapted(bases, targets=targets)
    assert [match.tensors for match in matches] == tensors
    named = lora.trainable(model)
    assert sum(match.parameters for match in matches) == sum(p.numel() for p in named.values())
    assert all(p.dtype == torch.float32 for p in named.values())
    assert not any("vision" in name or "lm_head" in name for name in named)


def test_untuned_adapters_change_nothing(bases):
    model, _, _ = adapted(bases, "nf4")
    tokens = torch.arange(1000, 1030)[None]
    with torch.no_grad():
        fresh = model(input_ids=tokens).logits
        stir(model)
        tuned = model(input_ids=tokens).logits
        with lora.without_adapters(model):
            off = model(input_ids=tokens).logits
    assert torch.equal(fresh, off)
    assert relative(tuned, fresh) > 1e-3


@pytest.mark.parametrize("targets", [("attention",), ("experts",), ALL])
def test_peft_loads_it_onto_transformers_own_model(checkpoint, bases, tmp_path, targets):
    """Rank 5, 8 experts, B not zero: a wrong expert order would show."""
    model, settings, _ = adapted(bases, targets=targets)
    stir(model)
    lora.save(model, tmp_path, settings, "tiny")
    theirs = PeftModel.from_pretrained(reference(checkpoint), tmp_path)
    tokens = torch.arange(1000, 1040)[None]
    with torch.no_grad():
        found, wanted = theirs(input_ids=tokens).logits, model(input_ids=tokens).logits
        with theirs.disable_adapter():
            untuned = theirs(input_ids=tokens).logits
    assert relative(found, wanted) < 1e-5
    assert relative(untuned, wanted) > 1e-3


def test_save_and_load_are_inverse(bases, tmp_path):
    model, settings, _ = adapted(bases)
    stir(model)
    before = {name: p.detach().clone() for name, p in lora.trainable(model).items()}
    lora.save(model, tmp_path, settings, "tiny")
    stir(model)
    lora.load(model, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in lora.trainable(model).items())
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert len(list(file.keys())) == 80


def test_an_adapter_of_other_targets_is_refused(bases, tmp_path):
    model, settings, _ = adapted(bases, targets=("attention",))
    lora.save(model, tmp_path, settings, "tiny")
    other, _, _ = adapted(bases, targets=("shared",))
    with pytest.raises(Ms4Error, match=r"not those of adapters\.targets"):
        lora.load(other, tmp_path)


def test_every_adapter_learns(bases):
    model, _, _ = adapted(bases, "nf4")
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    parameters = lora.trainable(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    batch = collate([documents([60, 60]), documents([100], seed=1)])
    for step in range(2):
        loss_sum(model, batch, 64).backward()
        assert_adapters_learn(parameters, step)
        optimizer.step()
        optimizer.zero_grad()


def test_a_dead_adapter_stops_the_run(bases):
    model, _, _ = adapted(bases, "nf4")
    for module in model.modules():
        if hasattr(module, "down_lora"):
            module.down_lora.enabled = False
    loss_sum(model, collate([documents([60, 60])]), 64).backward()
    with pytest.raises(Ms4Error, match=r"4 of 80 adapter tensors get no gradient.*down_lora\.B"):
        assert_adapters_learn(lora.trainable(model), 0)


def test_checkpointing_gives_the_same_gradients(bases):
    batch, results = collate([documents([50, 30])]), []
    for checkpointing in (False, True):
        model, _, _ = adapted(bases, "nf4")
        stir(model)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        loss_sum(model, batch, 64).backward()
        results.append([p.grad for p in lora.trainable(model).values()])
    assert all(relative(a, b) < 1e-5 for a, b in zip(*results, strict=True))
