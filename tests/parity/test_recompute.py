"""The independent path: it agrees with the converter on every storage, and a bit is enough to see
that something is wrong."""

import numpy as np
import pytest
import torch

from ms4 import spec
from ms4.errors import Ms4Error
from ms4.weights import fp8
from ms4.weights.convert import descale_directory
from ms4.weights.layouts import Source
from ms4.weights.recompute import decode_e4m3, recompute, round_to_bf16
from tests import small_source

from .conftest import spoil

LAYER = "language_model.model.layers.0."
DOWN = LAYER + "mlp.experts.down_proj"
GATE_UP = LAYER + "mlp.experts.gate_up_proj"
O_PROJ = LAYER + "self_attn.o_proj.weight"
NORM = LAYER + "input_layernorm.weight"


def test_decoding_by_bits_is_torchs():
    codes = torch.arange(256, dtype=torch.uint8)
    wanted = codes.view(fp8.FP8).float().numpy()
    np.testing.assert_array_equal(decode_e4m3(codes.numpy()), wanted)


def test_rounding_by_bits_is_torchs():
    """Random bits that are numbers, ties among them."""
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    bits[::3] = bits[::3] & 0xFFFF0000 | 0x8000
    values = bits.view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 3e38)]
    wanted = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(round_to_bf16(values), wanted)


def made(tmp_path, layout, to):
    source = small_source.write(tmp_path / "source", layout)
    descale_directory(source, tmp_path / "base", to, "plain")
    return source, tmp_path / "base"


def errors(source, base, to, **options):
    with Source(source) as opened:
        return {
            tensor.disk: recompute(opened, base, tensor, to, **options)
            for tensor in spec.tensors(opened.dims)
        }


@pytest.mark.parametrize("to", ["bf16", "nf4", "fp8"])
@pytest.mark.parametrize("layout", ["hf", "native"])
def test_it_agrees_with_the_converter(tmp_path, layout, to):
    found = errors(*made(tmp_path, layout, to), to, every_expert=True)
    inexact = {name for name, error in found.items() if error}
    experts = {name for name in found if ".mlp.experts." in name}
    # A gate and an up of one expert share a scale in FP8: one of the two is rounded again.
    rounded = {name for name in experts if "gate_up" in name} if layout == "native" else set()
    assert inexact == {"bf16": set(), "nf4": experts, "fp8": rounded}[to]
    assert all(error < 0.12 for error in found.values())


def zero(codes):
    codes.zero_()


def zero_rows(codes):
    codes[:, ::2] = 0


def one_outlier(codes):
    codes[:] = 0x08
    codes[1, 3, 5] = 0x7E


def one_value(codes):
    codes[:] = 0x33


@pytest.mark.parametrize("change", [zero, zero_rows, one_outlier, one_value])
def test_nf4_of_odd_weights_is_no_fault(tmp_path, change):
    """Blocks without a largest, groups of one magnitude, one that dwarfs the others."""
    source = small_source.write(tmp_path / "source")
    for path in small_source.shards_of(source):
        spoil(
            path,
            lambda tensors: [
                change(tensor.view(torch.uint8))
                for name, tensor in tensors.items()
                if name.endswith(("gate_up_proj", "down_proj")) and tensor.dim() == 3
            ],
        )
    descale_directory(source, tmp_path / "base", "nf4", "plain")
    errors(source, tmp_path / "base", "nf4", every_expert=True)


def bits(name, *at, flip=1):
    """A change of the lowest bit of one element, or of others."""

    def change(tensors):
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensors[name].element_size()]
        tensors[name].view(kind)[at] ^= flip

    return change


def times(name, factor):
    return lambda tensors: tensors[name].mul_(factor)


def swapped(name):
    """The first expert's weights in the last one's place, and the other way round."""

    def change(tensors):
        tensors[name] = tensors[name].view(torch.uint8).flip(0).contiguous().view(fp8.FP8)

    return change


@pytest.mark.parametrize(
    ("to", "name", "change", "message"),
    [
        ("bf16", DOWN, bits(DOWN, 3, 63, 31), "1 of the 2048 values .* are not the product"),
        ("bf16", O_PROJ, bits(O_PROJ, 0, 0), "are not the product"),
        ("bf16", NORM, bits(NORM, 5), "are not the product"),
        ("nf4", DOWN, bits(DOWN + ".nf4", 3, 1023), "expert 3: 1 of .* not the nearest"),
        ("nf4", GATE_UP, bits(GATE_UP + ".absmax", 0, 0), "expert 0: 1 of the codes of its absmax"),
        ("nf4", GATE_UP, times(GATE_UP + ".absmax_scale", 1.01), "scales of its absmax"),
        ("nf4", DOWN, times(DOWN + ".absmax_offset", 1.01), "the mean of its absmax"),
        ("nf4", O_PROJ, times(O_PROJ, 1.01), "are not the product"),
        ("fp8", DOWN, bits(DOWN, 3, 63, 31), "1 of the 2048 codes .* are not the source's"),
        ("fp8", DOWN, swapped(DOWN), "are not the source's"),
        ("fp8", O_PROJ, bits(O_PROJ.replace("weight", "weight_scale_inv")), "its scale is"),
        ("fp8", GATE_UP, bits(GATE_UP + "_scale_inv", 0, 0, 0), "its scale is"),
    ],
)
def test_a_bit_is_seen(tmp_path, to, name, change, message):
    source, base = made(tmp_path, "hf", to)
    spoil(base / "layer-00.safetensors", change)
    with Source(source) as opened:
        for tensor in spec.tensors(opened.dims):
            if tensor.disk == name:
                with pytest.raises(
                    Ms4Error, match=rf"layer-00\.safetensors: {name}: differs .*{message}"
                ):
                    recompute(opened, base, tensor, to)
            else:
                recompute(opened, base, tensor, to)


def test_a_piece_without_the_tensor_is_named(tmp_path):
    source, base = made(tmp_path, "hf", "nf4")
    spoil(base / "layer-00.safetensors", lambda tensors: tensors.pop(DOWN + ".absmax"))
    with pytest.raises(Ms4Error, match=r"layer-00\.safetensors: .*down_proj\.absmax is missing"):
        errors(source, base, "nf4")
