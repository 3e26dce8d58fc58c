"""Packed experts with LoRA against the per-expert reference, forward and gradients."""

import math

import pytest
import torch
from torch import nn

from ms4 import memory
from ms4.model import experts, grouped, stores
from ms4.weights import fp8, nf4

from .conftest import relative

KINDS = ("nf4", "fp8", "bf16")


def store(kind, shape):
    """Random weights in a store, and the same by hand: fp32 [E, O, I]."""
    weight = torch.randn(shape) / 8
    if kind == "nf4":
        made, packed = stores.NF4Store(shape, "cpu"), nf4.quantize(weight.bfloat16())
        for suffix, value in packed.by_suffix().items():
            getattr(made, suffix[1:]).data = value
        return made, nf4.dequantize_plain(packed, shape, torch.float32)
    if kind == "fp8":
        made, (codes, scale) = stores.FP8Store(shape, "cpu"), fp8.quantize(weight)
        made.codes.data, made.scale_inv.data = codes.view(torch.uint8), scale
        return made, (codes.float() * scale.float()).bfloat16().float()
    made = stores.BF16Store(shape, "cpu")
    made.weight.data = weight.bfloat16()
    return made, weight.bfloat16().float()


class Module(nn.Module):
    """What transformers' expert module is to `experts_forward`: E experts, H hidden, I wide."""

    def __init__(self, kind="nf4", E=6, H=64, I=32, ranks=(4, 4), **workspace):  # noqa: E741
        super().__init__()
        self.act_fn, self.E, self.H = nn.SiLU(), E, H
        self.workspace = stores.Workspace(**{"held": False, **workspace})
        shapes = {"gate_up": (E, 2 * I, H), "down": (E, H, I)}
        for (name, shape), rank in zip(shapes.items(), ranks, strict=True):
            self.add_module(f"{name}_proj", store(kind, shape)[0])
            lora = experts.ExpertLora(shape, rank, 0.5) if rank else None
            if lora is not None:
                nn.init.normal_(lora.B, std=0.1)
            self.add_module(f"{name}_lora", lora)

    def inputs(self, T=23, K=2, used=None):
        """Hidden states, routes to experts of `used` only, weights."""
        pool = torch.arange(self.E) if used is None else torch.tensor(used)
        picks = [pool[torch.randperm(len(pool))[:K]] for _ in range(T)]
        routes = torch.stack(picks) if picks else torch.zeros(0, K, dtype=torch.long)
        hidden = torch.randn(T, self.H).to(self.device()).requires_grad_()
        weights = torch.rand(*routes.shape).to(self.device()).requires_grad_()
        return hidden, routes.to(self.device()), weights

    def with_adapters_in(self, dtype):
        """Packed weights stay what they are."""
        for lora in (self.gate_up_lora, self.down_lora):
            lora.to(dtype)
        return self

    def device(self):
        return next(self.parameters()).device


def results(module, inputs, function=experts.experts_forward):
    """The output, and the gradients of hidden states, routes' weights and adapters."""
    hidden, routes, weights = inputs
    out = function(module, hidden, routes, weights)
    trained = [p for p in module.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(5)
    upstream = torch.randn(out.shape, generator=generator).to(out.device)
    return out, *torch.autograd.grad(out, [hidden, weights, *trained], upstream)


def assert_as_the_reference(module, inputs, most=1e-5):
    found = results(module, inputs)
    wanted = results(module, inputs, experts.experts_forward_plain)
    assert len(found) == len(wanted) == 3 + sum(p.requires_grad for p in module.parameters())
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        if b.any():
            assert relative(a, b) < most
        else:
            assert not a.any()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [(4, 4), (5, 11), (16, 0), (0, 3), (0, 0)])
def test_forward_and_gradients(device, kind, ranks):
    """Six experts: no rank is their number, some are no multiple of eight."""
    torch.manual_seed(0)
    module = Module(kind, ranks=ranks).to(device)
    assert_as_the_reference(module, module.inputs())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("T", "K", "used"),
    [
        (1, 2, None),
        (1, 1, None),
        (40, 1, [3]),  # all tokens on one expert
        (17, 2, [0, 5]),  # the first and the last
        (9, 2, [2, 3, 4]),
        (31, 6, None),  # every token on all
    ],
)
def test_odd_routings(device, kind, T, K, used):
    torch.manual_seed(1)
    module = Module(kind).to(device)
    found = assert_as_the_reference(module, module.inputs(T, K, used))
    idle = sorted(set(range(6)) - set(used or range(6)))
    for gradient in found[3:]:
        assert not gradient[idle].any()


@pytest.mark.parametrize("used", [[0], [0, 1, 2], [1, 4], None])
@pytest.mark.parametrize("size", [1, 3, 6])
def test_a_crowded_slice_goes_in_parts(device, monkeypatch, used, size):
    """No more than twice the even share of rows at once, and the results are the same."""
    torch.manual_seed(2)
    monkeypatch.setattr(memory, "SLICE_ROWS", 5)
    parts, slices = [], experts._slices

    def noted(*arguments):
        for part in slices(*arguments):
            parts.append((part.rows, int(part.offsets_E[-1])))
            yield part

    monkeypatch.setattr(experts, "_slices", noted)
    T, K = 53, 1 if used == [0] else 2
    module = Module(experts=size).to(device)
    assert_as_the_reference(module, module.inputs(T, K, used))
    most = math.ceil(2 * T * K * size / 6)
    forward = parts[: len(parts) // 2]
    assert forward == parts[len(parts) // 2 :], "forward and backward pass"
    assert [begin for rows, _ in forward for begin in (rows.start,)] == [
        0,
        *(rows.stop for rows, _ in forward[:-1]),
    ]
    assert forward[-1][0].stop == T * K
    for rows, end in forward:
        assert 0 < end == rows.stop - rows.start <= most
    assert used != [0] or len(forward) == math.ceil(T / most)


def test_no_tokens():
    module = Module()
    out, *gradients = results(module, module.inputs(T=0))
    assert out.shape == (0, 64)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("kind", "H", "I"), [("bf16", 33, 7), ("fp8", 13, 5), ("fp8", 1, 1), ("nf4", 20, 16)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_sizes(kind, H, I, dtype):  # noqa: E741
    """Rows that are no whole 16 bytes go without torch's kernel."""
    torch.manual_seed(2)
    module = Module(kind, 5, H, I, (3, 2)).with_adapters_in(dtype)
    hidden, routes, weights = module.inputs()
    inputs = (hidden.detach().to(dtype).requires_grad_(), routes, weights)
    assert_as_the_reference(module, inputs, 1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    """Against finite differences in float64: each number for one store, random directions for the
    others."""
    torch.manual_seed(3)
    module = Module(kind, 4, 16, 8, (2, 3), experts=2).with_adapters_in(torch.float64)
    hidden, routes, weights = module.inputs(5, 2, [0, 1, 3])
    factors = [p for p in module.parameters() if p.requires_grad]
    assert len(factors) == 4

    def function(hidden, weights, *_):
        return experts.experts_forward(module, hidden, routes, weights)

    inputs = (hidden.detach().double().requires_grad_(), weights.detach().double().requires_grad_())
    assert torch.autograd.gradcheck(function, (*inputs, *factors), fast_mode=kind != "bf16")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3, 7, 64])
def test_slices_make_no_difference(kind, size):
    """70 experts of which most get no token: whole slices have none, others only in the middle."""
    torch.manual_seed(4)
    module = Module(kind, 70, experts=size)
    inputs = module.inputs(40, 3, [0, 1, 2, 3, 4, 5, 6, 20, 40, 41, 44, 63, 64, 69])
    found = assert_as_the_reference(module, inputs)
    module.workspace = stores.Workspace(held=False)
    for a, b in zip(found, results(module, inputs), strict=True):
        assert relative(a, b) < 1e-6 or torch.equal(a, b)


def test_a_slice_of_the_published_size_can_be_counted():
    """gate_up_proj of all 128 experts has 2**31 elements, one more than kernels can count."""
    workspace, elements = stores.Workspace.on(torch.device("meta")), 4096 * 4096
    assert 128 * elements == stores.MOST_ELEMENTS + 1
    assert workspace.size(elements, torch.bfloat16) == stores.CUDA_EXPERTS <= 64
    assert stores.Workspace(experts=128).size(elements, torch.bfloat16) == 127
    assert stores.Workspace(experts=128).size(2**31, torch.bfloat16) == 1
    assert stores.Workspace(most_bytes=1 << 20).size(1 << 18, torch.float32) == 1
    assert stores.Workspace(most_bytes=1 << 20).size(1 << 17, torch.float32) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_stores_give_the_weights(device, kind):
    """Bit for bit, a range and a choice of experts, in each dtype, in memory held or not."""
    torch.manual_seed(5)
    made, weight = store(kind, (6, 64, 256))
    made, weight = made.to(device), weight.to(device)
    chosen = torch.tensor([0, 2, 5], device=device)
    # A BF16 weight is a rounded one: that of NF4 is rounded from fp32.
    for held in {False, device.type == "cuda"}:
        workspace = stores.Workspace(held=held)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for which in (slice(0, 6), slice(2, 5), chosen):
                found = made.take(which, dtype, workspace)
                assert found.dtype == dtype
                assert torch.equal(found, weight[which].to(dtype))
    assert torch.equal(made.dequantize(1, 3, torch.float32), weight[1:3])


def test_memory_is_held_and_used_again():
    workspace = stores.Workspace()
    first = workspace.take((2, 3, 4), torch.float32, torch.device("cpu"))
    again = workspace.take((5, 2), torch.float32, torch.device("cpu"))
    assert first.data_ptr() == again.data_ptr()
    more = workspace.take((7, 7), torch.float32, torch.device("cpu"))
    assert workspace.take((1,), torch.float32, torch.device("cpu")).data_ptr() == more.data_ptr()
    other = workspace.take((2, 2), torch.bfloat16, torch.device("cpu"))
    assert (other.shape, other.dtype) == ((2, 2), torch.bfloat16)


def test_memory_that_generation_took_serves_training():
    """A tensor that is made in inference mode may not be written to outside of it."""
    module = Module("fp8")
    inputs = module.inputs()
    with torch.inference_mode():
        experts.experts_forward(module, *(t.detach() for t in inputs))
    results(module, inputs)


class Counting(stores.BF16Store):
    """Notes which experts are asked for."""

    def take(self, which, dtype, workspace):
        numbers = range(*which.indices(self.shape[0])) if isinstance(which, slice) else which
        self.asked = [*getattr(self, "asked", []), [int(n) for n in numbers]]
        return super().take(which, dtype, workspace)


@pytest.mark.parametrize(
    ("used", "asked"),
    [
        ([9], [[9]]),
        ([70, 75], [[70, 75]]),  # few of what lies between: a choice
        ([0, 1, 2, 3, 5], [[0, 1, 2, 3, 4, 5]]),  # most of it: a range, the idle one with it
        ([3, 63, 64, 65], [[3, 63], [64, 65]]),
    ],
)
def test_experts_without_tokens_are_not_dequantized(used, asked):
    """Neither in the forward nor in the backward pass."""
    torch.manual_seed(6)
    module = Module("bf16", 80, 8, 4)
    for name, shape in (("gate_up_proj", (80, 8, 8)), ("down_proj", (80, 8, 4))):
        made = Counting(shape, "cpu")
        made.weight.data = torch.randn(shape).bfloat16()
        setattr(module, name, made)
    routes = torch.tensor(used).repeat(3)[:, None]
    hidden, weights = torch.randn(len(routes), 8, requires_grad=True), torch.rand(len(routes), 1)
    out = experts.experts_forward(module, hidden, routes, weights)
    assert module.gate_up_proj.asked == module.down_proj.asked == asked
    out.sum().backward()
    assert module.gate_up_proj.asked == module.down_proj.asked == asked * 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_for_the_backward_pass(kind):
    """The inputs, the adapters, gate and up, the order of the rows: no weight, no gathered rows,
    no output of an expert."""
    torch.manual_seed(7)
    module = Module(kind, E=6, H=64, I=32, ranks=(4, 5))
    hidden, routes, weights = module.inputs(T=50, K=3)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = experts.experts_forward(module, hidden, routes, weights)
    adapters = {p.data_ptr() for p in module.parameters() if p.requires_grad}
    assert adapters <= {t.data_ptr() for t in saved}
    own = sorted(tuple(t.shape) for t in saved if t.data_ptr() not in adapters)
    # T·H, T·K, and of S = 150 rows: order and 2·I; of 6 experts: where their rows end.
    assert own == sorted([(50, 64), (50, 3), (150,), (150, 64), (6,)])
    out.sum().backward()
    frozen = [p for p in module.parameters() if not p.requires_grad]
    assert frozen
    assert all(p.grad is None for p in frozen)


def test_nothing_is_saved_without_gradients():
    module, saved = Module(), []
    hidden, routes, weights = module.inputs()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with torch.no_grad(), hooks:
        out = experts.experts_forward(module, hidden, routes, weights)
    assert not saved
    assert not out.requires_grad


def test_hidden_states_that_need_no_gradient_get_none():
    """Below the first adapter nothing learns, but the layer's own adapters do."""
    torch.manual_seed(8)
    module = Module()
    hidden, routes, weights = module.inputs()
    inputs = (hidden.detach(), routes, weights.detach())
    gradients = []
    for function in (experts.experts_forward, experts.experts_forward_plain):
        module.zero_grad()
        function(module, *inputs).square().sum().backward()
        gradients.append([p.grad for p in module.parameters() if p.requires_grad])
    assert all(relative(a, b) < 1e-5 for a, b in zip(*gradients, strict=True))


def test_recomputed_activations_give_the_same_gradients():
    """The memory that slices share is written again between the forward and the backward pass."""
    torch.manual_seed(9)
    module = Module(experts=2)
    hidden, routes, weights = module.inputs()
    other = Module("fp8", experts=2)
    other.workspace = module.workspace

    def layers(hidden, weights):
        hidden = hidden + experts.experts_forward(module, hidden, routes, weights)
        return hidden + experts.experts_forward(other, hidden, routes, weights)

    trained = [p for m in (module, other) for p in m.parameters() if p.requires_grad]
    straight, again = (
        torch.autograd.grad(run().square().sum(), [hidden, weights, *trained])
        for run in (
            lambda: layers(hidden, weights),
            lambda: torch.utils.checkpoint.checkpoint(layers, hidden, weights, use_reentrant=False),
        )
    )
    assert all(torch.equal(a, b) for a, b in zip(straight, again, strict=True))


def test_disabled_lora_is_the_base():
    torch.manual_seed(3)
    module = Module("nf4")
    inputs = module.inputs()
    tuned = experts.experts_forward(module, *inputs)
    module.gate_up_lora.enabled = module.down_lora.enabled = False
    base = experts.experts_forward(module, *inputs)
    module.gate_up_lora = module.down_lora = None
    assert torch.equal(base, experts.experts_forward(module, *inputs))
    assert relative(tuned, base) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic(device, kind):
    torch.manual_seed(4)
    module = Module(kind).to(device)
    inputs = module.inputs(T=200)
    first, *others = (results(module, inputs) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grouped_products_are_their_plain_twins(device, dtype):
    torch.manual_seed(5)
    x, g = torch.randn(20, 24, device=device, dtype=dtype), torch.randn(20, 8, device=device)
    w = torch.randn(5, 24, 8, device=device, dtype=dtype)
    g, offsets = g.to(dtype), torch.tensor([4, 4, 11, 20, 20], device=device, dtype=torch.int32)
    most = 1e-6 if dtype == torch.float32 else 0.01
    for found, wanted in (
        (grouped.product(x, w, offsets), grouped.product_plain(x, w, offsets)),
        (
            grouped.product(x, w.mT.contiguous().mT, offsets),
            grouped.product_plain(x, w, offsets),
        ),
        (grouped.outer(x, g, offsets), grouped.outer_plain(x, g, offsets)),
    ):
        assert found.shape == wanted.shape
        assert relative(found, wanted) < most
    assert not grouped.outer(x, g, offsets)[[1, 4]].any()
