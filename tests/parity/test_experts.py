"""Packed experts with LoRA against the per-expert reference, forward and gradients."""

import pytest
import torch
from torch import nn

from ms4.model import experts, stores
from ms4.weights import nf4

from .conftest import relative

E, H, I, R, T, K = 6, 64, 32, 4, 23, 2  # noqa: E741


class Module(nn.Module):
    """What transformers' expert module is to `experts_forward`."""

    def __init__(self, store, with_lora=True, count=E):
        super().__init__()
        self.act_fn = nn.SiLU()
        self.workspace = stores.Workspace.on(torch.device("cpu"))
        shapes = {"gate_up": (count, 2 * I, H), "down": (count, H, I)}
        for name, shape in shapes.items():
            weight = torch.randn(shape) / 8
            if store == "nf4":
                made = stores.NF4Store(shape, "cpu")
                for suffix, value in nf4.quantize(weight.bfloat16()).by_suffix().items():
                    getattr(made, suffix[1:]).data = value
            else:
                made = stores.BF16Store(shape, "cpu")
                made.weight.data = weight.bfloat16()
            self.add_module(f"{name}_proj", made)
            lora = experts.ExpertLora(shape, R, 0.5) if with_lora else None
            if lora is not None:
                nn.init.normal_(lora.B, std=0.1)
            self.add_module(f"{name}_lora", lora)


def inputs(count=E, tokens=T):
    hidden = torch.randn(tokens, H, requires_grad=True)
    routes = torch.stack([torch.randperm(count)[:K] for _ in range(tokens)])
    weights = torch.rand(tokens, K, requires_grad=True)
    return hidden, routes, weights


@pytest.mark.parametrize("store", ["nf4", "bf16"])
@pytest.mark.parametrize("with_lora", [True, False])
def test_forward_and_gradients(store, with_lora):
    torch.manual_seed(0)
    module = Module(store, with_lora)
    results = []
    hidden, routes, weights = inputs()
    for function in (experts.experts_forward, experts.experts_forward_plain):
        out = function(module, hidden, routes, weights)
        trained = [p for p in module.parameters() if p.requires_grad]
        grads = torch.autograd.grad(out.square().sum(), [hidden, weights, *trained])
        results.append((out, *grads))
    assert len(results[0]) == 3 + 4 * with_lora
    for found, wanted in zip(*results, strict=True):
        assert relative(found, wanted) < 1e-5


def test_idle_experts_and_more_than_one_slice():
    """70 experts are two slices; most get no token, one slice gets none at all."""
    torch.manual_seed(1)
    module = Module("nf4", count=70)
    hidden, _, weights = inputs(70, 3)
    routes = torch.tensor([[0, 1], [63, 1], [0, 63]])
    for chosen in (routes, routes + 6):
        found = experts.experts_forward(module, hidden, chosen, weights)
        wanted = experts.experts_forward_plain(module, hidden, chosen, weights)
        assert relative(found, wanted) < 1e-5


def test_frozen_weights_get_no_gradient_and_are_not_saved():
    torch.manual_seed(2)
    module = Module("bf16")
    hidden, routes, weights = inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        experts.experts_forward(module, hidden, routes, weights).sum().backward()
    assert not [t for t in saved if t.shape in {(E, 2 * I, H), (E, H, I), (E, H, 2 * I)}]
    assert all(p.grad is None for p in module.parameters() if not p.requires_grad)
    assert not any(p.requires_grad for p in module.gate_up_proj.parameters())


def test_disabled_lora_is_the_base():
    torch.manual_seed(3)
    module = Module("nf4")
    hidden, routes, weights = inputs()
    tuned = experts.experts_forward(module, hidden, routes, weights)
    module.gate_up_lora.enabled = module.down_lora.enabled = False
    base = experts.experts_forward(module, hidden, routes, weights)
    module.gate_up_lora = module.down_lora = None
    assert torch.equal(base, experts.experts_forward(module, hidden, routes, weights))
    assert relative(tuned, base) > 1e-3


def test_deterministic():
    torch.manual_seed(4)
    module = Module("nf4")
    hidden, routes, weights = inputs()
    grads = [
        torch.autograd.grad(
            experts.experts_forward(module, hidden, routes, weights).square().sum(),
            [hidden, module.gate_up_lora.A],
        )
        for _ in range(3)
    ]
    assert all(
        torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True)
    )
