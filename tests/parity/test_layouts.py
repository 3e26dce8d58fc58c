"""Both layouts read and descaled against weights that are put together by hand."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from ms4 import spec
from ms4.errors import Ms4Error
from ms4.weights import configs
from ms4.weights.base import Base
from ms4.weights.convert import descale_directory
from ms4.weights.layouts import Source, matrix_scales, rope_order
from tests import small_source

from . import by_hand

LAYOUTS = ("hf", "native")
DIMENSIONS = {
    "small": small_source.DIMS,
    "tiny": replace(spec.TINY, layers=2, vocabulary=512),
    "odd": replace(
        small_source.DIMS,
        layers=3,
        experts=5,
        expert_width=24,
        shared_experts=2,
        q_rank=20,
        kv_rank=12,
        vision_layers=2,
        vision_hidden=30,
        vision_heads=3,
        vision_head=10,
        merge=3,
    ),
    "one of each": replace(small_source.DIMS, layers=1, experts=1, experts_per_token=1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", DIMENSIONS.values(), ids=DIMENSIONS)
def test_bf16_is_every_code_times_its_scale(tmp_path, layout, dims):
    """Rounded to BF16 once, for every element, whatever the sizes; gate and up have scales of their
    own in the native layout."""
    source = small_source.write(tmp_path / "source", layout, dims)
    descale_directory(source, tmp_path / "base", "bf16", "plain")
    wanted, found = by_hand.bf16_weights(source), by_hand.stored(tmp_path / "base")
    assert found.keys() == wanted.keys() == {t.disk for t in spec.tensors(dims)}
    for name, tensor in wanted.items():
        assert by_hand.same_bits(found[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("to", ["bf16", "fp8"])
def test_a_base_reads_as_bf16_from_any_element_on(tmp_path, layout, to):
    """`Base.read_bf16` over the ends of experts, and the scales that it has kept."""
    source = small_source.write(tmp_path / "source", layout)
    descale_directory(source, tmp_path / "base", to, "plain")
    wanted = by_hand.bf16_weights(source)
    if to == "fp8":  # its own codes: gate and up were brought to one scale
        wanted |= by_hand.bf16_weights(tmp_path / "base")
    with Base(tmp_path / "base") as base, Source(source) as origin:
        for tensor in base.tensors:
            bits = wanted[tensor.disk].view(torch.int16).numpy().view(np.uint16).reshape(-1)
            some = tensor.numel // 3
            for start, count in ((0, tensor.numel), (some + 1, some), (tensor.numel - 1, 1)):
                found = base.read_bf16(tensor, start, count)
                assert np.array_equal(found, bits[start : start + count]), tensor.disk
            if tensor.dtype == "F8_E4M3":
                assert base.source_scales(tensor) == origin.source_scales(tensor)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_segments_are_the_whole_of_a_parameter(tmp_path, layout):
    """In order, without a gap, each within the stored tensor that it is of, each part once."""
    directory = small_source.write(tmp_path / "s", layout, DIMENSIONS["odd"])
    with Source(directory) as source:
        for tensor in spec.tensors(source.dims):
            at, seen = 0, set()
            for segment in source.segments(tensor):
                assert segment.at == at
                elements = math.prod(segment.entry.shape)
                assert 0 <= segment.offset <= segment.offset + segment.count <= elements
                part = range(segment.offset, segment.offset + segment.count)
                assert seen.isdisjoint((segment.entry.name, element) for element in part)
                seen |= {(segment.entry.name, element) for element in part}
                at += segment.count
            assert at == tensor.numel
            whole = source.read_across(source.segments(tensor), 0, tensor.numel)
            cut = source.read_across(source.segments(tensor), tensor.numel // 3, 7)
            item = len(whole) // tensor.numel
            assert np.array_equal(cut, whole[tensor.numel // 3 * item :][: 7 * item])


def test_rope_order_is_the_public_converters():
    """Rows of a head 0 1 2 3 4 5 (pairs) become 0 2 4 1 3 5 (halves)."""
    dims = replace(spec.TINY, vision_heads=3, vision_head=6)
    rows = torch.arange(18).view(3, 3, 2).transpose(1, 2).reshape(-1)
    assert rope_order(dims).tolist() == rows.tolist()
    assert rows[:6].tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_stand_by_their_matrix(tmp_path, layout):
    directory = small_source.write(tmp_path / "s", layout)
    tensors = by_hand.stored(directory)
    layer = "layers.1.experts." if layout == "native" else by_hand.TEXT + "layers.1.mlp.experts."
    with Source(directory) as source:
        gate_up = next(t for t in spec.tensors(source.dims) if "1.mlp.experts.gate" in t.disk)
        weights, activations = source.source_scales(gate_up)
        assert len(weights) == len(activations) == 2 * source.dims.experts
        assert (weights, activations) == matrix_scales(gate_up, layout, source.numbers)
        for expert in range(source.dims.experts):
            for half, w in enumerate(("w1", "w3")):
                if layout == "native":
                    weight = tensors[f"{layer}{expert}.{w}.qscale_weight"]
                    activation = tensors[f"{layer}{expert}.{w}.qscale_act"]
                else:
                    weight = tensors[layer + "gate_up_proj_scale_inv"][expert]
                    activation = tensors[layer + "gate_up_proj_activation_scale"][expert]
                assert weights[2 * expert + half] == weight.item()
                assert activations[2 * expert + half] == activation.item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_and_settings_alone_are_enough(tmp_path, layout):
    """One file without an index, no tokenizer, and of the settings only those of the layout."""
    whole = small_source.write(tmp_path / "whole", layout, shards=1)
    bare = tmp_path / "bare"
    bare.mkdir()
    lone = "model.safetensors" if layout == "hf" else "consolidated.safetensors"
    settings = "config.json" if layout == "hf" else "params.json"
    (shard,) = small_source.shards_of(whole)
    (bare / lone).write_bytes(shard.read_bytes())
    (bare / settings).write_bytes((whole / settings).read_bytes())
    for source, target in ((whole, tmp_path / "a"), (bare, tmp_path / "b")):
        descale_directory(source, target, "bf16", "plain")
    made = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert made == sorted(path.name for path in (tmp_path / "b").glob("*.safetensors"))
    for name in made:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "b/config.json").exists()
    assert not (tmp_path / "b/tekken.json").exists()


def test_scales_of_one_element_may_have_a_dimension(tmp_path):
    """Some writers store a number as [1] and not as []."""
    everything = small_source.tensors(small_source.DIMS, "native")
    source = small_source.write(tmp_path / "s", "native", shards=1)
    for name, stored in everything.items():
        if "qscale" in name:
            stored.shape = (1,)
    (shard,) = small_source.shards_of(source)
    small_source.save(everything, shard)
    descale_directory(source, tmp_path / "base", "bf16", "plain")
    wanted = by_hand.bf16_weights(source)
    found = by_hand.stored(tmp_path / "base")
    assert all(by_hand.same_bits(found[name], tensor) for name, tensor in wanted.items())


# The settings in both layouts.


@pytest.mark.parametrize("dims", [spec.Dimensions(), *DIMENSIONS.values()])
@pytest.mark.parametrize("fp8", [True, False])
def test_settings_survive_the_native_layout(dims, fp8):
    config = configs.hf_config(dims)
    if not fp8:
        del config["quantization_config"]
    back = configs.from_params(configs.to_params(config, fp8=fp8), "params.json")
    # These are the defaults, which the HF layout leaves out.
    written = {"routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1}
    config["text_config"] |= written
    assert back == config


def test_settings_that_are_not_the_defaults_survive():
    config = configs.hf_config(spec.TINY)
    config["text_config"] |= {
        "intermediate_size": 300,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "routed_scaling_factor": 2.5,
        "n_group": 2,
        "topk_group": 2,
    }
    config["text_config"]["rope_parameters"] |= {
        "rope_theta": 5e4,
        "factor": 16.0,
        "original_max_position_embeddings": 256,
        "max_position_embeddings": 4096,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "llama_4_scaling_beta": 0.25,
    }
    config["vision_config"]["image_size"] = 280
    config["vision_config"]["rope_parameters"]["rope_theta"] = 300.0
    before = copy.deepcopy(config)
    params = json.loads(json.dumps(configs.to_params(config, fp8=True)))
    assert configs.from_params(params, "params.json") == before == config


def test_settings_from_params_build_the_model():
    """transformers makes the very parameters of the table of them."""
    dims = DIMENSIONS["odd"]
    params = configs.to_params(configs.hf_config(dims), fp8=False)
    config = Mistral3Config(**configs.from_params(params, "params.json"))
    with torch.device("meta"):
        model = Mistral3ForConditionalGeneration(config)
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert found == {t.transformers: t.shape for t in spec.tensors(dims)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("dim"), "dim is None"),
        (lambda p: p["moe"].update(num_experts=-1), r"moe\.num_experts is -1"),
        (lambda p: p.update(moe=[]), r"moe\.num_experts is None"),
        (lambda p: p["vision_encoder"].pop("patch_size"), r"vision_encoder\.patch_size is None"),
        (lambda p: p["moe"].update(first_k_dense_replace=1), "all layers are MoE"),
    ],
)
def test_params_of_another_model_are_refused(change, message):
    params = configs.to_params(configs.hf_config(spec.TINY), fp8=True)
    change(params)
    with pytest.raises(Ms4Error, match=message):
        configs.from_params(params, "params.json")
