"""Chunked cross-entropy against torch's, in fp32, forward and gradient."""

import pytest
import torch
import torch.nn.functional as F

from ms4.model.loss import cross_entropy_sum

from .conftest import relative


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_value_and_gradient(chunk):
    torch.manual_seed(0)
    hidden = torch.randn(50, 32, requires_grad=True)
    head, targets = torch.randn(4096, 32), torch.randint(4096, (50,))
    found = cross_entropy_sum(hidden, head, targets, chunk)
    wanted = F.cross_entropy(hidden @ head.T, targets, reduction="sum")
    assert relative(found, wanted) < 1e-6
    a, b = (torch.autograd.grad(loss * 0.3, hidden)[0] for loss in (found, wanted))
    assert relative(a, b) < 1e-5


def test_bf16_is_as_near_to_fp32_as_torch_is():
    torch.manual_seed(1)
    hidden = torch.randn(64, 64).bfloat16().requires_grad_()
    head, targets = torch.randn(2048, 64).bfloat16(), torch.randint(2048, (64,))
    exact_hidden = hidden.detach().float().requires_grad_()
    exact = F.cross_entropy(exact_hidden @ head.float().T, targets, reduction="sum")
    (exact_gradient,) = torch.autograd.grad(exact, exact_hidden)
    plain = F.cross_entropy((hidden @ head.T).float(), targets, reduction="sum")
    (plain_gradient,) = torch.autograd.grad(plain, hidden)
    ours = cross_entropy_sum(hidden, head, targets, 16)
    (gradient,) = torch.autograd.grad(ours, hidden)
    assert relative(ours, exact) <= 2 * relative(plain, exact) + 1e-6
    assert relative(gradient, exact_gradient) <= 2 * relative(plain_gradient, exact_gradient)


def test_no_rows_is_zero():
    hidden = torch.randn(0, 8, requires_grad=True)
    loss = cross_entropy_sum(hidden, torch.randn(16, 8), torch.zeros(0, dtype=torch.long), 4)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.shape == (0, 8)


def test_without_gradient_none_is_computed():
    with torch.no_grad():
        loss = cross_entropy_sum(torch.randn(4, 8), torch.randn(16, 8), torch.arange(4), 2)
    assert not loss.requires_grad
