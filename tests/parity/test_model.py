"""The loaded model against transformers filled by hand, packed documents against each alone."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from ms4 import spec
from ms4.model import attention
from ms4.model.build import load_model
from ms4.train.batches import collate, loss_sum
from ms4.weights.recompute import decode_e4m3

from .conftest import documents, relative

CPU = torch.device("cpu")


def reference(checkpoint, scale="plain", raw_experts=False):
    """transformers' own model, its weights decoded from FP8 bit by bit, eager everything; with the
    experts' codes as weights if they are to be raw."""
    config = json.loads((checkpoint / "config.json").read_text())
    config.pop("quantization_config")
    config["dtype"] = "float32"
    if scale == "plain":
        config["text_config"]["rope_parameters"] |= {"mscale_all_dim": 0.0, "attention_factor": 1.0}
    model = Mistral3ForConditionalGeneration._from_config(
        Mistral3Config(**config), attn_implementation="eager"
    )
    stored = {}
    for path in checkpoint.glob("*.safetensors"):
        stored.update(load_file(path))
    state = {}
    for tensor in spec.tensors(spec.TINY):
        value = stored[tensor.disk]
        if tensor.dtype == "F8_E4M3":
            codes = decode_e4m3(value.view(torch.uint8).numpy())
            raw = raw_experts and tensor.role == "experts"
            scale_inv = np.float32(1) if raw else stored[tensor.scale].float().numpy()
            value = torch.from_numpy(codes * scale_inv).bfloat16()
        state[tensor.transformers] = value.float()
    model.load_state_dict(state, strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.from_numpy(np.random.default_rng(0).integers(1000, 4096, (2, 40)))


@torch.no_grad()
def test_bf16_base_is_transformers_model(checkpoint, bases, tokens):
    ours = load_model(bases["bf16"] / "weights/base", "bf16", CPU, torch.float32)
    wanted = reference(checkpoint)(input_ids=tokens).logits
    assert relative(ours(input_ids=tokens).logits, wanted) < 1e-5


@torch.no_grad()
def test_the_softmax_scale_is_the_configured_one(checkpoint, bases, tokens):
    """transformers 5.23 reads the published config.json as `yarn`: the logits must differ."""
    ours = load_model(bases["bf16"] / "weights/base", "bf16", CPU, torch.float32)
    yarn = reference(checkpoint, scale="yarn")(input_ids=tokens).logits
    assert relative(ours(input_ids=tokens).logits, yarn) > 1e-3
    for layer in ours.model.language_model.layers:
        assert layer.self_attn.scaling == pytest.approx(32**-0.5)
    assert ours.config.text_config.softmax_scale == pytest.approx(32**-0.5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bf16", "nf4", "fp8"])
def test_experts_without_their_scales_would_be_seen(checkpoint, bases, tokens, kind):
    """Protects against the common loading fault, the experts' raw codes as weights: what is loaded
    is near the model with scales, and far from the one without."""
    ours = load_model(bases[kind] / "weights/base", kind, CPU, torch.float32)
    found = ours(input_ids=tokens).logits
    assert relative(found, reference(checkpoint)(input_ids=tokens).logits) < 0.1
    assert relative(found, reference(checkpoint, raw_experts=True)(input_ids=tokens).logits) > 0.5


@torch.no_grad()
def test_nf4_base_is_near_bf16(bases, tokens):
    near, exact = (
        load_model(bases[kind] / "weights/base", kind, CPU, torch.float32)(input_ids=tokens).logits
        for kind in ("nf4", "bf16")
    )
    assert 1e-4 < relative(near, exact) < 0.1


@torch.no_grad()
def test_image_goes_through_the_vision_tower(checkpoint, bases):
    """Vision weights are in the base and where they belong: image features equal transformers'."""
    ours = load_model(bases["nf4"] / "weights/base", "nf4", CPU, torch.float32)
    pixels = torch.randn(1, 3, 28, 56, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[28, 56]])
    wanted, found = (
        model.get_image_features(pixel_values=pixels, image_sizes=sizes).pooler_output[0]
        for model in (reference(checkpoint), ours)
    )
    assert relative(found, wanted) < 1e-5


@torch.no_grad()
def test_packed_documents_have_the_loss_they_have_alone(device, bases):
    model = load_model(bases["nf4"] / "weights/base", "nf4", device, torch.float32)
    group = documents([5, 17, 2, 30, 9])
    packed = loss_sum(model, collate([group[:3], group[3:]]).to(device), chunk=7)
    each = [collate([[document]]).to(device) for document in group]
    alone = sum(loss_sum(model, batch, chunk=1000) for batch in each)
    assert float(packed) == pytest.approx(float(alone), rel=1e-5)


@torch.no_grad()
def test_packed_logits_and_restarting_positions(device, bases):
    """Protects each packed document, the first one too: it has the logits that it has alone."""
    model = load_model(bases["bf16"] / "weights/base", "bf16", device, torch.float32)
    group = documents([11, 6])
    batch = collate([group]).to(device)
    assert batch.positions_BT.tolist() == [[*range(11), *range(6)]]
    packed = model(
        input_ids=batch.tokens_BT,
        position_ids=batch.positions_BT,
        **attention.packed(batch.starts_N, batch.longest),
    ).logits
    for (tokens, _), here in zip(group, (slice(0, 11), slice(11, 17)), strict=True):
        ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
        assert relative(packed[:, here], model(input_ids=ids[None]).logits) < 1e-5


def test_targets_never_cross_a_document():
    first, second = (np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32))
    trained = (np.array([1, 1, 1], np.uint8), np.array([1, 1], np.uint8))
    batch = collate([[(first, trained[0]), (second, trained[1])]])
    assert batch.targets_BT.tolist() == [[6, 7, -100, 9, -100]]
    assert (batch.trained, batch.tokens) == (3, 5)
