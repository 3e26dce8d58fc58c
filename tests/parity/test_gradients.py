"""Logits, loss and every adapter gradient of the whole model against transformers and PEFT.

The reference is transformers' own model in eager mode, filled with dequantized weights by hand, its
adapters PEFT's, which build W + ΔW. It sees each document alone, without padding or packing, and
its loss is torch's over the logits of all positions.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel

from ms4 import spec
from ms4.config import AdaptersSection
from ms4.model import lora
from ms4.model.build import load_model
from ms4.model.module import PackedLoss
from ms4.train.batches import IGNORED, collate
from ms4.weights import nf4

from . import by_hand
from .conftest import documents, relative

SETTINGS = AdaptersSection(targets=("attention", "shared", "experts"), rank=5, alpha=8.0)
LENGTHS = (21, 1, 40, 2, 33)
GROUPS = {
    "attention": "self_attn",
    "shared": "shared_experts",
    "experts": "mlp.experts",
}


def dequantized(base: Path) -> dict[str, torch.Tensor]:
    """A base's weights in fp32, by their names in the HF layout."""
    stored = by_hand.stored(base)
    weights = {}
    for tensor in spec.tensors(spec.TINY):
        if f"{tensor.disk}.nf4" in stored:
            packed = nf4.Packed(*(stored[tensor.disk + suffix] for suffix in nf4.SUFFIXES))
            weights[tensor.disk] = nf4.dequantize_plain(packed, tensor.shape, torch.float32)
        elif stored[tensor.disk].dtype == torch.float8_e4m3fn:
            scale = stored[f"{tensor.disk}_scale_inv"]
            weights[tensor.disk] = by_hand.product(stored[tensor.disk], scale).float()
        else:
            weights[tensor.disk] = stored[tensor.disk].float()
    return weights


class Ours:
    """Our model with adapters that are not zero, saved for PEFT."""

    def __init__(self, base, kind, device, dtype, directory):
        torch.manual_seed(0)
        self.model = load_model(base, kind, device, dtype)
        held = "fp32" if dtype == torch.float32 else "bf16"
        lora.add_adapters(self.model, SETTINGS.model_copy(update={"dtype": held}), spec.TINY)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in lora.trainable(self.model).values():
                noise = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.add_(noise.to(device))
        self.model.train()
        lora.save(self.model, directory, SETTINGS, "tiny")
        self.device = device

    def logits(self, group):
        """Of each document alone, end to end."""
        with torch.no_grad():
            rows = [self.model(input_ids=tokens_of(d, self.device)).logits[0] for d in group]
        return torch.cat(rows).cpu()

    def gradients(self, batches):
        """The loss a trained token, and the gradients by PEFT's names and in its layout."""
        total = sum(batch.trained for batch in batches)
        loss, training = 0.0, PackedLoss(self.model, chunk=7)
        self.model.zero_grad()
        for batch in batches:
            part = training(batch.to(self.device)) / total
            part.backward()
            loss += part.item()
        return loss, {
            lora.peft_name(name): lora.to_peft(name, p.grad).float().cpu()
            for name, p in lora.trainable(self.model).items()
        }


def tokens_of(document, device="cpu"):
    return torch.from_numpy(document[0]).long()[None].to(device)


class Theirs:
    """transformers' model with PEFT's adapter."""

    def __init__(self, base, dtype, adapter, device):
        config = json.loads((base / "config.json").read_text())
        model = by_hand.model(dequantized(base), config, dtype).to(device)
        self.model = PeftModel.from_pretrained(
            model, adapter, is_trainable=True, autocast_adapter_dtype=False
        )
        self.device = device
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)

    def logits(self, group):
        with torch.no_grad():
            rows = [self.model(input_ids=tokens_of(d, self.device)).logits[0] for d in group]
        return torch.cat(rows).cpu()

    def gradients(self, group):
        loss, trained = 0.0, sum(int(mask[1:].sum()) for _, mask in group)
        for ids, mask in group:
            tokens = tokens_of((ids, mask), self.device)
            wanted = torch.from_numpy(mask[1:]).bool().to(self.device)
            targets = torch.where(wanted, tokens[0, 1:], IGNORED)
            logits = self.model(input_ids=tokens).logits[0, :-1].float()
            if not wanted.any():  # torch's mean of nothing is no number
                continue
            part = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / trained
            part.backward()
            loss += part.item()
        return loss, {
            name.replace(".default.", "."): p.grad.float().cpu()
            for name, p in self.model.named_parameters()
            if "lora_" in name
        }


@pytest.fixture(scope="module")
def group():
    return documents(LENGTHS)


@pytest.mark.parametrize("kind", ["nf4", "fp8", "bf16"])
def test_fp32(device, bases, tmp_path, group, kind):
    """Packed in two rows of unequal length against each document alone."""
    base = bases[kind] / "weights/base"
    ours = Ours(base, kind, device, torch.float32, tmp_path)
    theirs = Theirs(base, torch.float32, tmp_path, device)
    assert relative(ours.logits(group), theirs.logits(group)) < 1e-5
    loss, found = ours.gradients([collate([list(group[:3]), list(group[3:])])])
    wanted_loss, wanted = theirs.gradients(group)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert found.keys() == wanted.keys()
    assert len(found) == 2 * spec.TINY.layers * (5 + 3 + 2)
    worst = max((relative(found[name], wanted[name]), name) for name in wanted)
    assert worst[0] < 1e-5, worst


@pytest.mark.parametrize("kind", ["nf4", "bf16"])
def test_bf16_is_as_near_to_fp32_as_eager_bf16_is(device, bases, tmp_path, kind):
    """The fp32 reference has the same weights and adapters, rounded to BF16 as they are held."""
    group = documents([40] * 3, seed=3)
    base = bases[kind] / "weights/base"
    ours = Ours(base, kind, device, torch.bfloat16, tmp_path)
    exact, eager = (
        Theirs(base, dtype, tmp_path, device) for dtype in (torch.float32, torch.bfloat16)
    )
    error, allowed = (relative(m.logits(group), exact.logits(group)) for m in (ours, eager))
    assert error <= 1.5 * allowed
    _, found = ours.gradients([collate([list(group)])])
    (_, plain), (_, wanted) = eager.gradients(group), exact.gradients(group)
    for target, part in GROUPS.items():
        names = [name for name in wanted if part in name]
        vectors = [torch.cat([g[n].flatten() for n in names]) for g in (found, plain, wanted)]
        error, allowed = (relative(vector, vectors[2]) for vector in vectors[:2])
        assert error <= 1.5 * allowed, target


def test_fp8_computes_as_its_bf16_products_do(bases, tmp_path, group):
    """Bit for bit, experts dequantized on the way and dense layers while they are loaded."""
    for dtype in (torch.float32, torch.bfloat16):
        found, wanted = (
            Ours(bases[kind] / "weights/base", kind, torch.device("cpu"), dtype, tmp_path)
            for kind in ("fp8", "bf16")
        )
        assert by_hand.same_bits(found.logits(group), wanted.logits(group))


def test_accumulation_is_one_large_batch(device, bases, tmp_path, group):
    """Four micro-batches of one document each and a micro-batch of four: the same step."""
    ours = Ours(bases["nf4"] / "weights/base", "nf4", device, torch.float32, tmp_path)
    four = [document for document in group if len(document[0]) > 1]
    results = [
        ours.gradients([collate([[document]]) for document in four]),
        ours.gradients([collate([[document] for document in four])]),
        ours.gradients([collate([list(four)])]),
    ]
    for loss, found in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        for name, gradient in results[0][1].items():
            assert relative(found[name], gradient) < 1e-5, name


def test_two_backward_passes_are_the_same_bits(device, bases, tmp_path, group):
    ours = Ours(bases["nf4"] / "weights/base", "nf4", device, torch.float32, tmp_path)
    batch = collate([list(group[:3]), list(group[3:])])
    (loss, first), (again, second) = (ours.gradients([batch]) for _ in range(2))
    assert loss == again
    for name, gradient in first.items():
        assert by_hand.same_bits(gradient, second[name]), name
