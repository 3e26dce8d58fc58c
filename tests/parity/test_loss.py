"""Chunked cross-entropy against torch's, in fp32, forward and gradient."""

import pytest
import torch
import torch.nn.functional as F

from ms4.model.loss import cross_entropy_sum

from .conftest import relative


def plain(hidden, head, rows, targets):
    """The logits of all rows at once, by torch."""
    return F.cross_entropy((hidden[rows] @ head.T).float(), targets, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_value_and_gradient(device, chunk):
    torch.manual_seed(0)
    hidden = torch.randn(80, 32, device=device, requires_grad=True)
    head, rows = torch.randn(4096, 32, device=device), torch.randperm(80, device=device)[:50]
    targets = torch.randint(4096, (50,), device=device)
    found, wanted = (
        loss(hidden, head, rows, targets, *more)
        for loss, more in ((cross_entropy_sum, (chunk,)), (plain, ()))
    )
    assert relative(found, wanted) < 1e-6
    a, b = (torch.autograd.grad(loss * 0.3, hidden)[0] for loss in (found, wanted))
    assert relative(a, b) < 1e-5
    idle = torch.ones(80, dtype=torch.bool, device=device)
    idle[rows] = False
    assert not a[idle].any()


def test_gradcheck():
    torch.manual_seed(0)
    hidden = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 5, dtype=torch.float64)
    rows, targets = torch.tensor([7, 0, 3, 8, 1]), torch.randint(11, (5,))
    assert torch.autograd.gradcheck(lambda x: cross_entropy_sum(x, head, rows, targets, 2), hidden)


def test_bf16_is_as_near_to_fp32_as_torch_is(device):
    torch.manual_seed(1)
    hidden = torch.randn(64, 64, device=device).bfloat16().requires_grad_()
    head = torch.randn(2048, 64, device=device).bfloat16()
    rows, targets = torch.arange(64, device=device), torch.randint(2048, (64,), device=device)
    exact_hidden = hidden.detach().float().requires_grad_()
    losses = {
        "exact": (plain(exact_hidden, head.float(), rows, targets), exact_hidden),
        "plain": (plain(hidden, head, rows, targets), hidden),
        "ours": (cross_entropy_sum(hidden, head, rows, targets, 16), hidden),
    }
    gradients = {name: torch.autograd.grad(*pair)[0] for name, pair in losses.items()}
    error = {name: relative(loss, losses["exact"][0]) for name, (loss, _) in losses.items()}
    assert losses["ours"][0].dtype == torch.float32
    assert error["ours"] <= 1.5 * error["plain"] + 1e-6
    error = {name: relative(found, gradients["exact"]) for name, found in gradients.items()}
    assert error["ours"] <= 1.5 * error["plain"]


def test_logits_far_apart_neither_overflow_nor_vanish():
    hidden = torch.tensor([[300.0, -300.0]], requires_grad=True)
    loss = cross_entropy_sum(hidden, torch.eye(2), torch.tensor([0]), torch.tensor([1]), 1)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == 600
    assert gradient.tolist() == [[1.0, -1.0]]


def test_no_rows_is_zero():
    hidden = torch.randn(3, 8, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    loss = cross_entropy_sum(hidden, torch.randn(16, 8), none, none, 4)
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()


def test_without_gradient_none_is_computed():
    """Nor for hidden states that need none: a frozen model is evaluated with grad on."""
    hidden, head = torch.randn(4, 8), torch.randn(16, 8)
    made = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: made.append(t) or t, lambda t: t):
        loss = cross_entropy_sum(hidden, head, torch.arange(4), torch.arange(4), 2)
    assert not loss.requires_grad
    assert not made


def test_the_logits_of_all_rows_are_never_held():
    """The largest tensor that exists at any time has a chunk's rows, and autograd keeps none."""
    sizes, kept = [], []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out,) if isinstance(t, torch.Tensor))
            return out

    hidden, head = torch.randn(64, 8, requires_grad=True), torch.randn(1000, 8)
    rows, targets = torch.arange(64), torch.randint(1000, (64,))
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with Watch(), hooks:
        cross_entropy_sum(hidden, head, rows, targets, 4).backward()
    assert max(sizes) == max(4 * 1000, head.numel())
    assert max(t.numel() for t in kept) == hidden.numel()
