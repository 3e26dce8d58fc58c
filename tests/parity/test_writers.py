"""Writers: what went out of FP8 comes back bit for bit, and what is not exact says so."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ms4 import spec
from ms4.errors import Ms4Error
from ms4.weights import fp8, nf4, writers
from ms4.weights.base import Base
from ms4.weights.convert import descale_directory
from ms4.weights.layouts import Source
from tests import small_source

from . import by_hand

TINY_LIMIT = 1_000_000
"""Bytes of one shard of the tiny checkpoint, as of the writers below."""
GATE_UP = by_hand.TEXT + "layers.1.mlp.experts.gate_up_proj"
DOWN = by_hand.TEXT + "layers.1.mlp.experts.down_proj"
O_PROJ = by_hand.TEXT + "layers.0.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def tiny_bases(checkpoint, tmp_path_factory):
    """The tiny checkpoint in each storage."""
    made = {}
    for to in ("bf16", "nf4", "fp8"):
        made[to] = tmp_path_factory.mktemp("tiny") / to
        descale_directory(checkpoint, made[to], to, "plain")
    return made


@pytest.fixture
def source(tmp_path):
    """A small checkpoint of random codes in the HF layout."""
    return small_source.write(tmp_path / "source", "hf")


def weight_files(directory):
    return [
        *(path.name for path in directory.glob("*.safetensors")),
        *directory.glob("*.index.json"),
    ]


# From FP8 and back.


@pytest.mark.parametrize("way", ["kept scales", "source", "fp8 base"])
def test_fp8_to_bf16_to_fp8_is_the_published_checkpoint(checkpoint, tiny_bases, tmp_path, way):
    """Every file of weights and the index, byte for byte: codes, scales, activation scales, shards,
    their order and their names."""
    with (
        Base(tiny_bases["fp8" if way == "fp8 base" else "bf16"]) as base,
        Source(checkpoint) as source,
    ):
        given = source if way == "source" else None
        written = writers.write_fp8(base, tmp_path / "out", given, TINY_LIMIT)
    assert written.notes == []
    names = by_hand.file_names(checkpoint)
    assert by_hand.file_names(tmp_path / "out") == names
    assert sorted(entry["path"] for entry in written.files) == names
    by_hand.assert_same_files(
        tmp_path / "out", checkpoint, [n for n in names if n != "config.json"]
    )
    made = json.loads((tmp_path / "out/config.json").read_text())
    published = json.loads((checkpoint / "config.json").read_text())
    assert made["quantization_config"] == published["quantization_config"]
    with Source(tmp_path / "out") as again:
        again.check_here()


@pytest.mark.parametrize("with_source", [False, True])
def test_every_code_comes_back_under_many_scales(source, tmp_path, with_source):
    with Base(by_hand.based(source)) as base, Source(source) as origin:
        written = writers.write_fp8(base, tmp_path / "out", origin if with_source else None)
    assert written.notes == []
    by_hand.assert_same_tensors(by_hand.stored(tmp_path / "out"), by_hand.stored(source))


def test_the_source_gives_what_bf16_cannot_carry(source, tmp_path):
    """Products below BF16's normal numbers lose bits, and with them their codes."""
    scale = O_PROJ.replace(".weight", ".weight_scale_inv")
    by_hand.edit(source, lambda held: held[scale].fill_(2e-38) if scale in held else None)
    with Base(by_hand.based(source)) as base, Source(source) as origin:
        writers.write_fp8(base, tmp_path / "with", origin)
        writers.write_fp8(base, tmp_path / "without")
    by_hand.assert_same_tensors(by_hand.stored(tmp_path / "with"), by_hand.stored(source))
    without = by_hand.stored(tmp_path / "without")[O_PROJ]
    assert not by_hand.same_bits(without, by_hand.stored(source)[O_PROJ])


def test_hf_to_native_to_hf_is_the_published_checkpoint(checkpoint, tiny_bases, tmp_path):
    with Source(checkpoint) as source:
        assert writers.write_native(source, tmp_path / "native", TINY_LIMIT).notes == []
    descale_directory(tmp_path / "native", tmp_path / "fp8", "fp8", "plain")
    descale_directory(tmp_path / "native", tmp_path / "bf16", "bf16", "plain")
    pieces = [path.name for path in tiny_bases["bf16"].glob("*.safetensors")]
    by_hand.assert_same_files(tmp_path / "bf16", tiny_bases["bf16"], pieces)
    names = weight_files(checkpoint)
    with Base(tmp_path / "fp8") as base:
        assert writers.write_fp8(base, tmp_path / "a", limit=TINY_LIMIT).notes == []
    with Base(tmp_path / "bf16") as base, Source(tmp_path / "native") as native:
        assert writers.write_fp8(base, tmp_path / "b", limit=TINY_LIMIT).notes == []
        assert writers.write_fp8(base, tmp_path / "c", native, TINY_LIMIT).notes == []
    for made in "abc":
        by_hand.assert_same_files(tmp_path / made, checkpoint, names)


# The native layout.


def test_native_has_the_names_transforms_and_scales_of_the_public_layout(checkpoint, tmp_path):
    with Source(checkpoint) as source:
        writers.write_native(source, tmp_path / "n", TINY_LIMIT)
    by_hand.assert_same_tensors(
        by_hand.bf16_weights(tmp_path / "n"), by_hand.bf16_weights(checkpoint)
    )
    native, hf = by_hand.stored(tmp_path / "n"), by_hand.stored(checkpoint)
    scales = {"qscale_weight": GATE_UP + "_scale_inv", "qscale_act": GATE_UP + "_activation_scale"}
    for kind, name in scales.items():
        for expert, value in enumerate(hf[name].flatten()):
            for w in ("w1", "w3"):  # they share it
                assert by_hand.same_bits(native[f"layers.1.experts.{expert}.{w}.{kind}"], value)
    params = json.loads((tmp_path / "n/params.json").read_text())
    assert params["quantization"] == {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    index = json.loads((tmp_path / "n/consolidated.safetensors.index.json").read_text())
    assert list(index["weight_map"]) == sorted(native, key=spec.natural)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in native.values())
    for file in set(index["weight_map"].values()):
        held = load_file(tmp_path / "n" / file)
        assert held.keys() == {name for name, where in index["weight_map"].items() if where == file}
        assert sum(tensor.nbytes for tensor in held.values()) <= max(
            TINY_LIMIT, *(tensor.nbytes for tensor in held.values())
        )


def test_native_in_bf16_has_no_scales(source, tmp_path):
    with Base(by_hand.based(source)) as base:
        assert writers.write_native(base, tmp_path / "n").notes == []
    native = by_hand.stored(tmp_path / "n")
    assert {tensor.dtype for tensor in native.values()} == {torch.bfloat16}
    assert not [name for name in native if "qscale" in name]
    assert "quantization" not in json.loads((tmp_path / "n/params.json").read_text())
    by_hand.assert_same_tensors(by_hand.bf16_weights(tmp_path / "n"), by_hand.bf16_weights(source))


def test_native_of_a_native_source_is_that(tmp_path):
    source = small_source.write(tmp_path / "source", "native")
    with Source(source) as origin:
        writers.write_native(origin, tmp_path / "n")
    by_hand.assert_same_tensors(by_hand.stored(tmp_path / "n"), by_hand.stored(source))
    assert json.loads((tmp_path / "n/params.json").read_text()) == json.loads(
        (source / "params.json").read_text()
    )


def test_native_of_an_fp8_base_is_that_of_its_source(source, tmp_path):
    with Base(by_hand.based(source, "fp8")) as base, Source(source) as origin:
        writers.write_native(base, tmp_path / "a")
        writers.write_native(origin, tmp_path / "b")
    names = by_hand.file_names(tmp_path / "a")
    assert names == by_hand.file_names(tmp_path / "b")
    by_hand.assert_same_files(tmp_path / "a", tmp_path / "b", names)


def test_a_softmax_scale_that_params_cannot_say_is_said(source, tmp_path):
    with Base(by_hand.based(source, scale="yarn")) as base:
        (note,) = writers.write_native(base, tmp_path / "n").notes
    assert "softmax scale yarn" in note


# Native → HF, where gate and up have scales of their own.


@pytest.fixture
def native(tmp_path):
    """Random codes; in layer 1 gate and up of experts 0 and 2 happen to have the same scale."""
    directory = small_source.write(tmp_path / "native", "native")
    for expert in (0, 2):
        gate, up = (f"layers.1.experts.{expert}.{w}.qscale_weight" for w in ("w1", "w3"))
        value = by_hand.stored(directory)[gate].item()
        by_hand.edit(
            directory, lambda held, up=up, v=value: held[up].fill_(v) if up in held else None
        )
    return directory


def test_native_to_hf_in_bf16_is_exact(native, tmp_path):
    with Base(by_hand.based(native)) as base:
        written = writers.write_bf16(base, tmp_path / "out")
        writers.write_native(base, tmp_path / "back")
    assert written.notes == []
    wanted = by_hand.bf16_weights(native)
    by_hand.assert_same_tensors(by_hand.stored(tmp_path / "out"), wanted)
    by_hand.assert_same_tensors(by_hand.bf16_weights(tmp_path / "back"), wanted)


def norm_error(found, wanted):
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("way", ["kept scales", "source", "fp8 base"])
def test_native_to_hf_in_fp8_is_lossy_where_the_scales_differ(native, tmp_path, capsys, way):
    """Exact where they agree; elsewhere gate and up come under the larger scale, one of them as it
    was, the other rounded again, no worse than by the public converter; and it is said."""
    to = "fp8" if way == "fp8 base" else "bf16"
    with Base(by_hand.based(native, to)) as base, Source(native) as origin:
        given = origin if way == "source" else None
        (note,) = writers.write_fp8(base, tmp_path / "out", given).notes
    assert "native layout: 6; " in note  # of the 8 experts of two layers
    assert "lossy" in note
    said = capsys.readouterr().err
    assert note in said
    assert ("6 expert matrices share a scale" in said) == (to == "fp8")  # by the conversion
    out, stored = by_hand.stored(tmp_path / "out"), by_hand.stored(native)
    found, exact = by_hand.bf16_weights(tmp_path / "out"), by_hand.bf16_weights(native)
    wrong = []
    for layer in (0, 1):
        at = f"{by_hand.TEXT}layers.{layer}.mlp.experts.gate_up_proj"
        for expert in range(4):
            own = [f"layers.{layer}.experts.{expert}.{w}." for w in ("w1", "w3")]
            scales = [stored[name + "qscale_weight"] for name in own]
            acts = [stored[name + "qscale_act"] for name in own]
            shared = out[at + "_scale_inv"][expert]
            assert shared == max(scales)
            assert out[at + "_activation_scale"][expert] == max(acts)
            for half, name, scale in zip(out[at][expert].chunk(2), own, scales, strict=True):
                codes = stored[name + "weight"]
                if scale == shared:
                    assert by_hand.same_bits(half, codes)
                    continue
                wanted = codes.double() * scale.double()
                theirs = (codes.bfloat16() * (scale / shared)).clamp(-448, 448).to(fp8.FP8)
                error = norm_error(half.double() * shared.double(), wanted)
                assert 1e-3 < error < 0.05
                assert error <= norm_error(theirs.double() * shared.double(), wanted)
                wrong.append((by_hand.product(half, shared), by_hand.product(codes, scale)))
    assert len(wrong) == 6
    if to == "bf16":
        error = norm_error(*(torch.cat(some) for some in zip(*wrong, strict=True)))
        assert f"norm-wise error {error:.2%}" in note
    gate_up = {name for name in exact if "gate_up" in name}
    by_hand.assert_same_tensors(found, exact, but=gate_up)


# Weights that were changed since, as by merged adapters.


@pytest.mark.parametrize("factor", [3.0, 6.1])  # the nearest scale is above the least, and below
@pytest.mark.parametrize("with_source", [False, True])
def test_what_changed_is_rounded_and_the_rest_is_the_sources(source, tmp_path, with_source, factor):
    directory = by_hand.based(source)

    def change(held):
        if O_PROJ in held:
            held[O_PROJ].mul_(0.9)
        if GATE_UP in held:
            held[GATE_UP][1].mul_(factor)  # outgrows its scale
            held[DOWN][2].neg_()  # has codes still

    by_hand.edit(directory, change)
    with Base(directory) as base, Source(source) as origin:
        notes = writers.write_fp8(base, tmp_path / "out", origin if with_source else None).notes
    before, out = by_hand.stored(source), by_hand.stored(tmp_path / "out")
    weights = by_hand.stored(directory)
    changed = {O_PROJ, GATE_UP, GATE_UP + "_scale_inv", DOWN}
    by_hand.assert_same_tensors(out, before, but=changed)

    kept = before[O_PROJ.replace(".weight", ".weight_scale_inv")].float()
    shares = (weights[O_PROJ].float() / kept).clamp(-448, 448)
    assert by_hand.same_bits(out[O_PROJ], shares.to(fp8.FP8))

    scales, grown = out[GATE_UP + "_scale_inv"], weights[GATE_UP][1]
    wanted = grown.abs().amax().double() / 448
    assert scales[1].double() >= wanted
    assert torch.nextafter(scales[1], torch.zeros_like(scales[1])).double() < wanted
    shares = (grown.float() / scales[1].float()).clamp(-448, 448)
    assert by_hand.same_bits(out[GATE_UP][1], shares.to(fp8.FP8))
    for expert in (0, 2, 3):
        assert scales[expert] == before[GATE_UP + "_scale_inv"][expert]
        assert by_hand.same_bits(out[GATE_UP][expert], before[GATE_UP][expert])
    back = by_hand.bf16_weights(tmp_path / "out")
    assert by_hand.same_bits(back[DOWN], weights[DOWN])

    found = torch.cat([back[O_PROJ].flatten(), back[GATE_UP][1].flatten()])
    exact = torch.cat([weights[O_PROJ].flatten(), grown.flatten()])
    assert notes[0] == (
        "matrices that were changed and rounded to FP8: 2, norm-wise error "
        f"{norm_error(found, exact):.2%}."
    )
    assert notes[1].endswith(f"got a larger one: 1 ({GATE_UP}[1]).")
    assert len(notes) == 2


def test_largest_magnitude_that_bf16_rounded_up_still_fits(source, tmp_path):
    """448 times a scale may be no BF16 number; the next above it is no reason for a new scale."""
    scale = torch.tensor(133 / 128 * 2**-10).bfloat16()  # 7 · 133 takes 10 bits
    name = O_PROJ.replace(".weight", ".weight_scale_inv")
    by_hand.edit(source, lambda held: held[name].copy_(scale) if name in held else None)
    largest = by_hand.product(torch.tensor(448.0).to(fp8.FP8), scale)
    assert largest.double() > 448 * scale.double()
    with Base(by_hand.based(source)) as base:
        assert writers.write_fp8(base, tmp_path / "out").notes == []
    by_hand.assert_same_tensors(by_hand.stored(tmp_path / "out"), by_hand.stored(source))


def test_weights_that_are_not_finite_are_named(source, tmp_path):
    directory = by_hand.based(source)
    by_hand.edit(
        directory, lambda held: held[GATE_UP][3, 5].fill_(float("inf")) if GATE_UP in held else 0
    )
    with Base(directory) as base, pytest.raises(Ms4Error, match=r"gate_up_proj\[3\].*not finite"):
        writers.write_fp8(base, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.json")] == []


# Out of NF4.


def test_never_fp8_from_nf4(tiny_bases, tmp_path):
    with Base(tiny_bases["nf4"]) as base, pytest.raises(Ms4Error, match=r"in nf4.*bf16 or fp8"):
        writers.write_fp8(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bf16_from_nf4_is_what_is_left_and_says_so(tmp_path):
    """With several groups of blocks an expert, the last one not whole."""
    dims = replace(small_source.DIMS, hidden=512, expert_width=40)
    directory = by_hand.based(small_source.write(tmp_path / "source", "hf", dims), "nf4")
    with Base(directory) as base:
        written = writers.write_bf16(base, tmp_path / "out")
        again = writers.write_native(base, tmp_path / "native")
    assert "lossy" in written.notes[0]
    assert written.notes == again.notes
    held, out = by_hand.stored(directory), by_hand.stored(tmp_path / "out")
    assert out.keys() == {t.disk for t in spec.tensors(dims)}
    for tensor in spec.tensors(dims):
        wanted = held.get(tensor.disk)
        if wanted is None:
            packed = nf4.Packed(*(held[tensor.disk + suffix] for suffix in nf4.SUFFIXES))
            wanted = nf4.dequantize_plain(packed, tensor.shape, torch.bfloat16)
        assert by_hand.same_bits(out[tensor.disk], wanted)
    by_hand.assert_same_tensors(by_hand.bf16_weights(tmp_path / "native"), out)


def test_bf16_from_fp8_is_exact(source, tmp_path):
    with Base(by_hand.based(source, "fp8")) as base:
        assert writers.write_bf16(base, tmp_path / "out").notes == []
    by_hand.assert_same_tensors(by_hand.stored(tmp_path / "out"), by_hand.bf16_weights(source))


def test_what_an_fp8_base_has_lost_already_is_said(native, tmp_path):
    with Base(by_hand.based(native, "fp8")) as base:
        written = writers.write_bf16(base, tmp_path / "bf16")
        again = writers.write_native(base, tmp_path / "back")
    assert "native layout: 6; " in written.notes[0]
    assert written.notes == again.notes
    weights = by_hand.bf16_weights(native.with_name("native-fp8-plain"))
    by_hand.assert_same_tensors(by_hand.stored(tmp_path / "bf16"), weights)
    by_hand.assert_same_tensors(by_hand.bf16_weights(tmp_path / "back"), weights)
