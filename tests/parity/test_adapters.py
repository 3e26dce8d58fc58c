"""Adapters: what they match, that they learn, and that PEFT loads what is saved."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors import safe_open

from ms4 import spec
from ms4.config import AdaptersSection
from ms4.errors import Ms4Error
from ms4.model import lora
from ms4.model.build import load_model
from ms4.train.batches import collate, loss_sum

from .conftest import documents, relative, stir
from .test_model import reference

CPU = torch.device("cpu")
ALL = ("attention", "shared", "experts")


def adapted(bases, kind="bf16", targets=ALL, rank=5, alpha=8.0, device=CPU, **changes):
    torch.manual_seed(0)
    model = load_model(bases[kind] / "weights/base", kind, device, torch.float32)
    settings = AdaptersSection(targets=targets, rank=rank, alpha=alpha, **changes)
    return model, settings, lora.add_adapters(model, settings, spec.TINY)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("targets", "tensors"),
    [
        (("attention",), {"attention": 40}),
        (("shared",), {"shared": 24}),
        (("experts",), {"experts": 16}),
        (("experts", "attention"), {"attention": 40, "experts": 16}),
        (("all",), {"attention": 40, "shared": 24, "experts": 16}),
    ],
    ids=str,
)
def test_matches(device, bases, targets, tensors, dtype):
    changes = experts_rank(targets)
    model, _, matches = adapted(bases, targets=targets, device=device, dtype=dtype, **changes)
    assert {match.target: match.tensors for match in matches} == tensors
    assert {m.target: m.rank for m in matches} == {
        name: 2 if name == "experts" else 5 for name in tensors
    }
    named = lora.trainable(model)
    assert sum(match.parameters for match in matches) == sum(p.numel() for p in named.values())
    assert {p.dtype for p in named.values()} == {lora.DTYPES[dtype]}
    assert {p.device.type for p in named.values()} == {device.type}
    assert not any("vision" in name or "lm_head" in name for name in named)


def experts_rank(targets):
    return {"expert_rank": 2} if {"all", "experts"} & set(targets) else {}


def test_a_surprising_match_is_refused(bases):
    """A model that has more layers of these names than its table, or none."""
    more = load_model(bases["bf16"] / "weights/base", "bf16", CPU, torch.float32)
    with pytest.raises(Ms4Error, match=r"`attention` matched 40 adapter tensors .* not 30 of"):
        lora.add_adapters(more, AdaptersSection(), replace(spec.TINY, layers=3))
    with pytest.raises(Ms4Error, match=r"`shared` matched 0 adapter tensors of 0 parameters"):
        lora.add_adapters(torch.nn.Linear(2, 2), AdaptersSection(targets=("shared",)), spec.TINY)


def test_dropout_is_of_dense_inputs_and_of_training_alone(device, bases):
    model, _, _ = adapted(bases, "nf4", targets=("all",), device=device, dropout=0.5)
    plain, _, _ = adapted(bases, "nf4", targets=("all",), device=device)
    stir(model), stir(plain)
    tokens = torch.arange(1000, 1030, device=device)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, plain(input_ids=tokens).logits)
        one, other = (model.train()(input_ids=tokens).logits for _ in range(2))
        assert relative(one, other) > 1e-3
        for layer in model.modules():
            if isinstance(layer, lora.DenseLora):
                layer.enabled = False
        assert torch.equal(model(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_dense_adapter_against_its_formula():
    torch.manual_seed(0)
    base = torch.nn.Linear(24, 40, bias=False).requires_grad_(False)
    layer = lora.LinearLora(base)
    layer.add_lora((24, 40), 5, 1.75, 0.0, torch.float32, CPU)
    layer.lora_B.data.normal_()
    x = torch.randn(2, 7, 24, requires_grad=True)
    wanted = x @ (base.weight + 1.75 * layer.lora_B @ layer.lora_A).T
    inputs, g = (x, layer.lora_A, layer.lora_B), torch.randn(2, 7, 40)
    assert relative(layer(x).detach(), wanted.detach()) < 1e-6
    for found, reference_ in zip(
        torch.autograd.grad(layer(x), inputs, g),
        torch.autograd.grad(wanted, inputs, g),
        strict=True,
    ):
        assert relative(found, reference_) < 1e-5


def test_untuned_adapters_change_nothing(device, bases):
    model, _, _ = adapted(bases, "nf4", device=device)
    tokens = torch.arange(1000, 1030, device=device)[None]
    with torch.no_grad():
        fresh = model(input_ids=tokens).logits
        stir(model)
        tuned = model(input_ids=tokens).logits
        with lora.without_adapters(model):
            off = model(input_ids=tokens).logits
    assert torch.equal(fresh, off)
    assert relative(tuned, fresh) > 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("error:.*rank_pattern")
@pytest.mark.parametrize(
    ("targets", "changes"),
    [
        (("attention",), {}),
        (("shared",), {"dtype": "bf16"}),
        (("experts",), {"rslora": True}),
        (("experts",), {"expert_rank": 3}),
        (("attention", "shared"), {"rslora": True, "dropout": 0.5}),
        (("attention", "experts"), {"dtype": "bf16", "expert_rank": 7}),
        (("all",), {}),
        (("all",), {"expert_rank": 2, "rslora": True, "dropout": 0.1}),
    ],
    ids=str,
)
def test_peft_loads_it_onto_transformers_own_model(checkpoint, bases, tmp_path, targets, changes):
    """Rank 5, 8 experts, B not zero: a wrong expert order or scaling would show."""
    model, settings, _ = adapted(bases, targets=targets, **changes)
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
    # As PEFT counts: nothing of the file was left over, nothing missing was made anew.
    held = sum(p.numel() for name, p in theirs.named_parameters() if "lora_" in name)
    assert held == sum(p.numel() for p in lora.trainable(model).values())


def test_saved_settings_hold_what_peft_accepts(checkpoint, bases, tmp_path):
    """Dropout beside `target_parameters` would make PEFT refuse the adapter."""
    model, settings, _ = adapted(bases, targets=("all",), dropout=0.25, expert_rank=2)
    lora.save(model, tmp_path, settings, "tiny")
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_dropout"]) == (2, 0.0)
    assert set(saved["rank_pattern"].values()) == {5}
    assert len(saved["rank_pattern"]) == 8
    with_dropout = LoraConfig(**{k: v for k, v in saved.items() if k != "peft_type"})
    with_dropout.lora_dropout = 0.25
    with pytest.raises(ValueError, match="dropout"):
        inject_adapter_in_model(with_dropout, reference(checkpoint))


def test_save_and_load_are_inverse(device, bases, tmp_path):
    model, settings, _ = adapted(bases, device=device)
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


def test_every_adapter_learns(device, bases):
    """B in the first step, A as well from the second on."""
    model, _, _ = adapted(bases, "nf4", device=device)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    parameters = lora.trainable(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    batch = collate([documents([60, 60]), documents([100], seed=1)]).to(device)
    for step in range(2):
        loss_sum(model, batch, 64).backward()
        learns = {n: bool(p.grad.count_nonzero()) for n, p in parameters.items()}
        assert learns == {n: step > 0 or not lora.is_first_factor(n) for n in parameters}
        optimizer.step()
        optimizer.zero_grad()


def test_a_dead_adapter_stops_the_run(bases):
    from ms4.train.loop import assert_adapters_learn  # with the tokenizer, of which no GPU test is

    model, _, _ = adapted(bases, "nf4")
    batch = collate([documents([60, 60])])
    loss_sum(model, batch, 64).backward()
    assert_adapters_learn(lora.trainable(model), 0)
    model.zero_grad()
    for module in model.modules():
        if hasattr(module, "down_lora"):
            module.down_lora.enabled = False
    loss_sum(model, batch, 64).backward()
    with pytest.raises(Ms4Error, match=r"4 of 80 adapter tensors get no gradient.*down_lora\.B"):
        assert_adapters_learn(lora.trainable(model), 0)
