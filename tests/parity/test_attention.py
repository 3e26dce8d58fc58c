"""Both ways of attention over packed documents, and that the choice between them is told."""

import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from ms4.model import attention
from ms4.model.build import load_model
from ms4.model.module import Batch, PackedLoss
from ms4.train.batches import collate

from .conftest import documents, relative


class Config:
    softmax_scale = 0.3


class Layer:
    config = Config()


def varlen_plain(query, key, value, starts, starts_k, longest, longest_k, *, scale, window_size):
    """torch's variable-length attention, document by document: it has no kernel for CPUs."""
    assert window_size == (-1, 0)
    assert starts is starts_k
    assert starts.dtype == torch.int32
    ends = starts.tolist()
    assert (ends[0], ends[-1]) == (0, query.shape[0])
    assert longest == longest_k == max(b - a for a, b in pairwise(ends))
    parts = []
    for a, b in pairwise(ends):
        own = (t[a:b].transpose(0, 1) for t in (query, key, value))
        parts.append(F.scaled_dot_product_attention(*own, is_causal=True, scale=scale))
    return torch.cat(parts, dim=1).transpose(0, 1)


@pytest.fixture
def kernel(device, monkeypatch):
    """torch's own on CUDA, its plain twin elsewhere; the dtype that it takes."""
    if device.type == "cuda":
        return torch.bfloat16
    monkeypatch.setattr(varlen, "varlen_attn", varlen_plain)
    return torch.float32


def a_batch():
    """Two rows of which the second is shorter: padding is a document too."""
    group = documents([11, 1, 30, 17, 9])
    return collate([group[:3], group[3:]])


def block_mask_attention(query, key, value, starts):
    """The reference: every pair of positions, those of two documents or ahead masked."""
    B, _, T, _ = query.shape
    at = torch.arange(B * T, device=query.device)
    document_BT = torch.searchsorted(starts.long(), at, right=True).view(B, T)
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    mask_BTT = same_BTT & torch.ones_like(same_BTT).tril()
    scale = Config.softmax_scale
    out = F.scaled_dot_product_attention(query, key, value, mask_BTT[:, None], scale=scale)
    return out.transpose(1, 2)


def test_packed_attention_is_that_under_a_block_mask(device, kernel):
    """Forward and gradients, with the configured scale and not the one that is handed over."""
    torch.manual_seed(0)
    batch = a_batch().to(device)
    shape = (2, 4, batch.tokens_BT.shape[1], 32)
    inputs = [torch.randn(shape, device=device).to(kernel).requires_grad_() for _ in range(3)]
    results = []
    given = attention.packed(batch.starts_N, batch.longest)
    for function in (attention.one_by_one_attention, attention.variable_length_attention):
        for scaling in (0.01, 99.0):
            results.append(function(Layer, *inputs, **given, scaling=scaling)[0])
    results.insert(0, block_mask_attention(*inputs, batch.starts_N))
    results = [(r, *torch.autograd.grad(r.float().square().sum(), inputs)) for r in results]
    most = 1e-5 if kernel == torch.float32 else 0.01
    for other in results[1:]:
        assert other[0].shape == (2, shape[2], 4, 32)
        assert all(relative(a, b) < most for a, b in zip(other, results[0], strict=True))


def test_the_whole_model_either_way(device, kernel, bases):
    model = load_model(bases["nf4"] / "weights/base", "nf4", device, kernel)
    losses = []
    for way in (attention.ONE_BY_ONE, attention.VARIABLE_LENGTH):
        model.model.language_model.set_attn_implementation(way)
        with torch.no_grad():
            losses.append(PackedLoss(model, 64)(a_batch().to(device)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if kernel == torch.float32 else 0.01)


def test_generation_under_variable_length_goes_by_the_mask(device, kernel, bases, monkeypatch):
    """Left padding and a cache: the same tokens as without padding."""
    model = load_model(bases["bf16"] / "weights/base", "bf16", device, kernel)
    model.model.language_model.set_attn_implementation(attention.VARIABLE_LENGTH)
    monkeypatch.setattr(varlen, "varlen_attn", None)  # it must not be asked
    prompt = torch.arange(1000, 1012, device=device)[None]
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": True}
    alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    padded = F.pad(prompt, (3, 0), value=11)
    seen = F.pad(torch.ones_like(prompt), (3, 0))
    assert torch.equal(model.generate(padded, attention_mask=seen, **options)[:, 3:], alone)


def test_boundaries_of_a_batch():
    batch = a_batch()
    # Rows of 42: 11, 1, 30; and 17, 9 with 16 of padding.
    assert batch.starts_N.tolist() == [0, 11, 12, 42, 59, 68, 84]
    assert batch.longest == 30
    assert batch.rows_N.tolist() == (batch.targets_BT.view(-1) != -100).nonzero().view(-1).tolist()
    one = Batch.of(*(torch.zeros(1, 1, dtype=torch.long) for _ in range(3)))
    assert (one.starts_N.tolist(), one.longest) == ([0, 1], 1)


def test_the_choice_says_why(device, capsys, bases):
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_model(bases["bf16"] / "weights/base", "bf16", device, kind)
    way = model.model.language_model.config._attn_implementation
    told = capsys.readouterr().out
    if device.type == "cuda":
        assert way == attention.VARIABLE_LENGTH
        assert "attention: variable-length" in told
    else:
        assert way == attention.ONE_BY_ONE
        assert "attention: a document at a time: torch's variable-length attention" in told


@pytest.mark.parametrize(
    ("capability", "dtype", "heads", "why"),
    [
        ((9, 0), torch.float32, (128, 128), "bf16 and fp16, not torch.float32"),
        ((7, 5), torch.float16, (128, 128), "8.0 and above, not 7.5"),
        ((9, 0), torch.bfloat16, (128, 64), r"one dimension .*, not \(128, 64\)"),
        ((9, 0), torch.bfloat16, (512, 512), "up to 256"),
        ((9, 0), torch.bfloat16, (128, 128), None),
    ],
)
def test_what_the_kernel_cannot_do_is_told(monkeypatch, capability, dtype, heads, why):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    way, told = attention.choose(torch.device("cuda"), dtype, heads)
    if why is None:
        assert way == attention.VARIABLE_LENGTH
    else:
        assert way == attention.ONE_BY_ONE
        assert re.search(why, told)
