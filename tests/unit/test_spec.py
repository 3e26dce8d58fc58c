"""The table of tensors against transformers, at full and at tiny size, and the published files."""

import pytest
import torch
from transformers import AutoConfig, Mistral3Config, Mistral3ForConditionalGeneration

from ms4 import spec
from ms4.errors import Ms4Error
from ms4.weights.shards import table_bytes

FULL = spec.Dimensions()


def full_config():
    text = AutoConfig.for_model("mistral4")
    return Mistral3Config(
        text_config=text.to_dict(),
        vision_config={"model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 24,
                       "num_attention_heads": 16, "intermediate_size": 4096, "patch_size": 14,
                       "image_size": 1540, "head_dim": 64},
        tie_word_embeddings=False,
    )  # fmt: skip


def assert_matches(dims, config):
    with torch.device("meta"):
        model = Mistral3ForConditionalGeneration(config)
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
    ours = {t.transformers: t.shape for t in spec.tensors(dims)}
    assert ours == theirs
    return sum(p.numel() for p in model.parameters())


def test_full_size_matches_transformers():
    config = full_config()
    assert spec.dimensions_from_config(config.to_dict(), "config.json") == FULL
    assert assert_matches(FULL, config) == spec.PUBLISHED_PARAMETERS
    assert sum(spec.parameters_by_role(FULL).values()) == spec.PUBLISHED_PARAMETERS


def test_parameters_by_role():
    assert spec.parameters_by_role(FULL) == {
        "embedding": 536_870_912,
        "attention": 1_009_778_688,
        "norm": 345_088,
        "router": 18_874_368,
        "experts": 77_309_411_328 + 38_654_705_664,
        "shared": 905_969_664,
        "head": 536_870_912,
        "vision": 403_305_472,
        "projector": 25_166_848,
    }


def test_published_shards_to_the_byte():
    table = spec.disk_tensors(FULL)
    assert len(table) == 1485
    shards = spec.plan_shards(table)
    assert [len(shard) for shard in shards] == [496, 525, 464]
    sizes = [table_bytes({name: table[name] for name in shard}) for shard in shards]
    assert sizes == [49_078_433_296, 49_132_710_896, 22_711_829_744]


def test_a_scale_lies_in_its_weights_shard():
    table = spec.disk_tensors(FULL)
    where = {n: i for i, shard in enumerate(spec.plan_shards(table)) for n in shard}
    assert all(where[name] == where[t.disk] for t in spec.tensors(FULL) for name in t.scales())


def test_names_are_unique_in_every_layout():
    rows = spec.tensors(FULL)
    for layout in ("disk", "native", "transformers"):
        names = [getattr(row, layout) for row in rows]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "not a Mistral Small 4"),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}, "not a Mistral"),
        (
            {"model_type": "mistral3",
             "text_config": {"model_type": "mistral4", "first_k_dense_replace": 1}},
            "first_k_dense_replace",
        ),
        (
            {"model_type": "mistral3",
             "text_config": {"model_type": "mistral4", "hidden_size": -1}},
            "`hidden` is -1",
        ),
    ],
)  # fmt: skip
def test_other_models_are_refused(config, message):
    with pytest.raises(Ms4Error, match=message):
        spec.dimensions_from_config(config, "x/config.json")


def test_softmax_scales_are_the_published_two():
    scales = FULL.softmax_scales({"factor": 128.0, "mscale_all_dim": 1.0})
    assert scales["plain"] == pytest.approx(0.08839, abs=1e-5)
    assert scales["yarn"] == pytest.approx(0.19497, abs=1e-5)
