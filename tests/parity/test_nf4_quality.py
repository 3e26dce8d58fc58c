"""The NF4 that a conversion leaves on disk, read by bitsandbytes alone, and its error beside that
of bitsandbytes' own quantization of the BF16 weights."""

from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch

from ms4 import spec, tiny
from ms4.manifest import write_json
from ms4.weights import configs, nf4
from ms4.weights.convert import descale_directory
from tests import small_source

from . import by_hand

KINDS = ("normal", "heavy-tailed", "zero blocks", "one outlier", "all zero", "uneven experts")
"""A layer each."""
WIDTHS = {"hf": 128, "native": 104}
"""Of an expert: with 128 its blocks are whole groups of 256, with 104 a last group is not whole."""
MOST = 1.005
"""Times bitsandbytes' own root-mean-square error."""


def weights_of(kind, shape, dice):
    """Weights [E, O, I] with spread 0.02, as trained ones have."""
    weight = torch.randn(shape, generator=dice)
    if kind == "heavy-tailed":  # Student's t with 3 degrees of freedom
        squares = torch.randn((3, *shape), generator=dice).square().mean(dim=0)
        weight = weight / squares.sqrt()
    elif kind == "zero blocks":
        blocks = weight.view(-1, nf4.BLOCK)
        blocks[torch.rand(len(blocks), generator=dice) < 0.3] = 0
    elif kind == "one outlier":
        weight[1, 3, 5] = 3e3
    elif kind == "all zero":
        weight.zero_()
    elif kind == "uneven experts":
        weight *= torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    return weight * 0.02


def dimensions(layout):
    return replace(
        small_source.DIMS,
        layers=len(KINDS),
        hidden=512,
        experts=3,
        expert_width=WIDTHS[layout],
    )


@pytest.fixture(scope="module", params=WIDTHS)
def made(request, tmp_path_factory):
    """(dimensions, BF16 weights by name, what the nf4 base holds): converted from FP8."""
    dims = dimensions(request.param)
    dice = torch.Generator().manual_seed(0)
    weights = {}
    for tensor in spec.tensors(dims):
        kind = KINDS[tensor.layer] if tensor.role == "experts" else "normal"
        weights[tensor.disk] = weights_of(kind, tensor.shape, dice).bfloat16()
    directory = tmp_path_factory.mktemp("nf4")
    source, config = directory / "source", configs.hf_config(dims)
    if request.param == "native":
        by_hand.native_checkpoint(source, weights, config)
    else:
        source.mkdir()
        activations = {
            name: torch.ones(shape).bfloat16()
            for tensor in spec.tensors(dims)
            for name, shape in list(tensor.scales().items())[1:]
        }
        named = {t.transformers: weights[t.disk] for t in spec.tensors(dims)}
        tiny.store(named, activations, source, dims)
        write_json(source / "config.json", config)
    descale_directory(source, directory / "base", "nf4", "plain")
    return dims, by_hand.bf16_weights(source), by_hand.stored(directory / "base")


def experts(dims, kind):
    layer = KINDS.index(kind)
    return [t for t in spec.tensors(dims) if t.role == "experts" and t.layer == layer]


def state_of(held, tensor, expert, dtype):
    """bitsandbytes' own state of one expert, out of nothing but the four tensors."""
    _, absmax, scale, offset = (held[tensor.disk + suffix][expert] for suffix in nf4.SUFFIXES)
    return bnb.QuantState(
        absmax=absmax,
        shape=torch.Size((tensor.numel // tensor.shape[0] // nf4.BLOCK, nf4.BLOCK)),
        code=bnb.get_4bit_type("nf4", device="cpu"),
        blocksize=nf4.BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=offset,
        state2=bnb.QuantState(
            absmax=scale, code=bnb.create_dynamic_map(), blocksize=nf4.GROUP, dtype=torch.float32
        ),
    )


def read_by_bitsandbytes(held, tensor, dtype):
    return torch.stack(
        [
            bnb.dequantize_4bit(
                held[tensor.disk + ".nf4"][expert][:, None], state_of(held, tensor, expert, dtype)
            ).view(tensor.shape[1:])
            for expert in range(tensor.shape[0])
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_bitsandbytes_reads_exactly_what_our_reference_gives(made, kind, dtype):
    """Its `dequantize_4bit` on a double-quantized state, expert by expert."""
    dims, _, held = made
    for tensor in experts(dims, kind):
        packed = nf4.Packed(*(held[tensor.disk + suffix] for suffix in nf4.SUFFIXES))
        theirs = read_by_bitsandbytes(held, tensor, dtype)
        plain = nf4.dequantize_plain(packed, tensor.shape, dtype)
        assert by_hand.same_bits(theirs, plain)
        assert by_hand.same_bits(nf4.dequantize(packed, tensor.shape, dtype), plain)


def rms(found, wanted):
    return float((found.double() - wanted.double()).square().mean().sqrt())


def quantized_by_bitsandbytes(weight):
    """Through its own double quantization and back, in float32."""
    codes, state = bnb.quantize_4bit(
        weight.reshape(-1, nf4.BLOCK),
        blocksize=nf4.BLOCK,
        compress_statistics=True,
        quant_type="nf4",
    )
    state.dtype = torch.float32
    return bnb.dequantize_4bit(codes, state).view(weight.shape)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_bitsandbytes_own(made, kind):
    """Against the BF16 weights, of each expert and of all together."""
    dims, weights, held = made
    for tensor in experts(dims, kind):
        wanted = weights[tensor.disk]
        ours = read_by_bitsandbytes(held, tensor, torch.float32)
        theirs = torch.stack([quantized_by_bitsandbytes(expert) for expert in wanted])
        assert rms(ours, wanted) <= MOST * rms(theirs, wanted)
        for expert, weight in enumerate(wanted):
            assert rms(ours[expert], weight) <= MOST * rms(theirs[expert], weight)
        if kind == "all zero":
            assert not ours.any()
        else:
            assert 0.01 < rms(ours, wanted) / float(wanted.double().square().mean().sqrt()) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "one outlier"])
def test_the_error_is_that_of_all_experts_quantized_at_once(made, kind):
    """bitsandbytes would take one mean magnitude for the whole stack where we take one an expert.

    With one huge outlier in one expert that is luck, either way: the mean decides how finely the
    other blocks' magnitudes come through 8 bits.
    """
    dims, weights, held = made
    for tensor in experts(dims, kind):
        wanted = weights[tensor.disk]
        ours = read_by_bitsandbytes(held, tensor, torch.float32)
        assert rms(ours, wanted) <= MOST * rms(quantized_by_bitsandbytes(wanted), wanted)


@pytest.mark.slow
def test_zero_blocks_stay_zero(made):
    """Their magnitude goes through 8 bits around the mean and need not come back as zero; their
    codes do."""
    dims, weights, held = made
    for tensor in experts(dims, "zero blocks"):
        blocks = weights[tensor.disk].view(-1, nf4.BLOCK)
        ours = read_by_bitsandbytes(held, tensor, torch.float32).view(-1, nf4.BLOCK)
        empty = ~blocks.any(dim=1)
        assert 0.2 < empty.float().mean() < 0.4
        assert not ours[empty].any()
