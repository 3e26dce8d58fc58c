"""FP8, NF4 and converter against bits, bitsandbytes and faults made on purpose."""

import json
import shutil

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file

from ms4 import spec, tiny
from ms4.cli import run_stage
from ms4.errors import Ms4Error
from ms4.weights import fp8, nf4
from ms4.weights.tables import packed_shapes

from .conftest import relative, settings, spoil

BASE = "weights/base"


def test_descale_is_the_bf16_product_to_the_bit():
    """For every finite code and many BF16 scales, as the published scales are."""
    codes = torch.arange(256, dtype=torch.uint8).view(fp8.FP8)
    codes = codes[~codes.float().isnan()]
    for scale in torch.rand(200).mul(0.01).add(1e-5).bfloat16():
        assert torch.equal(fp8.descale(codes, scale), codes.bfloat16() * scale)


@pytest.mark.parametrize("shape", [(6, 10), (3, 7), (4, 1030, 1028), (2, 4, 8), (3, 1, 5)])
def test_descale_by_table_is_the_product_to_the_bit(shape):
    """Of every code, NaN too; one scale, or one an expert; an odd count; more than one chunk."""
    torch.manual_seed(0)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8).view(fp8.FP8)
    scale = torch.rand(shape[0], 1, 1) if len(shape) == 3 else torch.rand(())
    made = fp8.descale(codes, scale.bfloat16())
    wanted = fp8.descale_plain(codes, scale.bfloat16())
    assert made.shape == codes.shape
    assert torch.equal(made.view(torch.int16), wanted.view(torch.int16))


def test_fp8_quantize_is_a_fixed_point_and_near():
    torch.manual_seed(0)
    weight = torch.randn(4, 64, 96) * torch.tensor([1.0, 1e-3, 30.0, 0.0])[:, None, None]
    codes, scale = fp8.quantize(weight)
    assert scale.shape == (4, 1, 1)
    assert scale.dtype == torch.bfloat16
    assert relative(fp8.descale(codes, scale), weight) < 0.03
    assert fp8.quantize(weight[0])[1].shape == ()


@pytest.mark.parametrize("shape", [(6, 64, 32), (3, 128, 64), (2, 256, 256), (5, 8, 8)])
def test_nf4_kernel_plain_and_bitsandbytes_agree(shape):
    torch.manual_seed(0)
    weight = (torch.randn(shape) / 10).bfloat16()
    packed = nf4.quantize(weight)
    sizes = packed_shapes(shape[0], shape[1] * shape[2])
    assert {k: tuple(v.shape) for k, v in packed.by_suffix().items()} == {
        k: size for k, (_, size) in sizes.items()
    }
    plain = nf4.dequantize_plain(packed, shape, torch.float32)
    assert torch.equal(nf4.dequantize(packed, shape, torch.float32), plain)
    for e in range(shape[0]):
        codes, state = bnb.quantize_4bit(
            weight[e].reshape(-1, 64), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        theirs = bnb.dequantize_4bit(codes, state).view(shape[1:])
        assert torch.equal(plain[e].bfloat16(), theirs)
    assert 0.05 < relative(plain, weight) < 0.11


def fp8_weights(kind):
    """FP8 codes [3, 256, 512] and scales of weights of a kind."""
    torch.manual_seed(0)
    weight = torch.randn(3, 256, 512)
    if kind == "heavy-tailed":
        weight = torch.distributions.StudentT(2.0).sample(weight.shape)
    elif kind == "zero blocks":
        weight[:, ::2] = 0
    elif kind == "one outlier":
        weight[1, 3, 5] = 3e4
    elif kind == "all zero":
        weight.zero_()
    return fp8.quantize(weight * torch.tensor([1e-3, 1.0, 30.0])[:, None, None])


@pytest.mark.parametrize(
    "kind", ["normal", "heavy-tailed", "zero blocks", "one outlier", "all zero"]
)
def test_nf4_straight_from_fp8_is_bitsandbytes_of_bf16_to_the_bit(kind):
    codes, scale = fp8_weights(kind)
    ours = nf4.quantize_fp8(codes, scale).by_suffix()
    theirs = nf4.quantize(fp8.descale(codes, scale)).by_suffix()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_nf4_of_one_expert_is_the_slice_of_all():
    torch.manual_seed(0)
    packed = nf4.quantize(torch.randn(4, 64, 64).bfloat16())
    one = nf4.Packed(*(tensor[2:3] for tensor in packed.by_suffix().values()))
    whole = nf4.dequantize(packed, (4, 64, 64), torch.float32)
    assert torch.equal(nf4.dequantize(one, (1, 64, 64), torch.float32)[0], whole[2])


def test_the_tiny_checkpoint_is_in_the_published_layout(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["quantization_config"]["activation_scheme"] == "static"
    assert spec.dimensions_from_config(config, "") == spec.TINY
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    assert list(index) == list(spec.disk_tensors(spec.TINY))
    assert len(set(index.values())) == 4
    stored = {}
    for file in set(index.values()):
        tensors = load_file(checkpoint / file)
        assert set(tensors) == {name for name, where in index.items() if where == file}
        stored.update(tensors)
    kinds = {"F8_E4M3": fp8.FP8, "BF16": torch.bfloat16}
    for name, (dtype, shape) in spec.disk_tensors(spec.TINY).items():
        assert stored[name].dtype == kinds[dtype]
        assert tuple(stored[name].shape) == shape
    for tensor in spec.tensors(spec.TINY):
        for name in tensor.scales():
            assert (stored[name] > 0).all()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(checkpoint, tmp_path):
    tiny.build(tmp_path / "again", seed=1, threads=1, steps=2)
    tiny.build(tmp_path / "other", seed=2, threads=1, steps=2)
    files = sorted(path.name for path in checkpoint.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in files:
        assert (checkpoint / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    shard = "model-00001-of-00004.safetensors"
    assert (checkpoint / shard).read_bytes() != (tmp_path / "other" / shard).read_bytes()


def test_base_config_says_the_scale_and_no_quantization(bases):
    config = json.loads((bases["nf4"] / BASE / "config.json").read_text())
    assert "quantization_config" not in config
    rope = config["text_config"]["rope_parameters"]
    assert (rope["mscale_all_dim"], rope["attention_factor"]) == (0.0, 1.0)
    assert config["text_config"]["softmax_scale"] == pytest.approx(32**-0.5)


def test_every_source_scale_is_kept_exactly(checkpoint, bases):
    kept = json.loads((bases["nf4"] / "weights/base.json").read_text())["source_scales"]
    stored = {}
    for path in checkpoint.glob("*.safetensors"):
        stored.update(load_file(path))
    names = [n for t in spec.tensors(spec.TINY) for n in t.scales()]
    assert sorted(kept) == sorted(names)
    for name in names:
        assert torch.equal(torch.tensor(kept[name]).bfloat16(), stored[name].flatten())


O_PROJ = "language_model.model.layers.0.self_attn.o_proj.weight"


def test_descale_keeps_whole_pieces_and_mends_a_damaged_one(project, checkpoint):
    pieces = {path: path.read_bytes() for path in (project / BASE).glob("*.safetensors")}
    times = {path: path.stat().st_mtime_ns for path in pieces}
    damaged = project / BASE / "layer-01.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (project / BASE / "layer-02.safetensors").unlink()
    before = (project / "weights/base.json").read_bytes()
    (project / "weights/base.json").unlink()
    run_stage("descale", settings(checkpoint))
    assert (project / "weights/base.json").read_bytes() == before
    assert {path: path.read_bytes() for path in pieces} == pieces
    made = {p.name for p in pieces if p.stat().st_mtime_ns != times[p]}
    assert made == {"layer-01.safetensors", "layer-02.safetensors"}


def broken_source(checkpoint, directory, change):
    shutil.copytree(checkpoint, directory)
    name = next(p for p in sorted(directory.glob("*.safetensors")) if O_PROJ in load_file(p))
    spoil(name, change)
    return directory


SCALE = O_PROJ.replace(".weight", ".weight_scale_inv")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_senseless_scale_is_named(checkpoint, tmp_path, monkeypatch, value):
    source = broken_source(checkpoint, tmp_path / "s", lambda t: t[SCALE].fill_(value))
    monkeypatch.chdir(tmp_path)
    run_stage("fetch", settings(source))
    with pytest.raises(Ms4Error, match=r"o_proj\.weight_scale_inv: a scale is zero"):
        run_stage("descale", settings(source))


def test_a_source_that_changed_after_fetch_is_refused(checkpoint, tmp_path, monkeypatch):
    source = tmp_path / "s"
    shutil.copytree(checkpoint, source)
    monkeypatch.chdir(tmp_path)
    run_stage("fetch", settings(source))
    shard = next(source.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes() + b"x")
    with pytest.raises(Ms4Error, match="not as its manifest says"):
        run_stage("descale", settings(source))
