"""Dense layers held as FP8 codes, the embedding held on the host: the same numbers, to the bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ms4 import spec
from ms4.config import AdaptersSection
from ms4.errors import Ms4Error
from ms4.model import checkpointing, lora
from ms4.model.build import held_as_fp8, load_model
from ms4.model.frozen import FP8Linear, HostEmbedding
from ms4.model.stores import Workspace
from ms4.weights.base import Base
from ms4.weights.convert import descale_directory
from ms4.weights.writers import write_native

from .conftest import relative, stir
from .test_checkpointing import gradients

CPU = torch.device("cpu")
DENSE = [tensor for tensor in spec.tensors(spec.TINY) if held_as_fp8(tensor)]


def build(base, kind, device, dense, policy="none"):
    torch.manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = load_model(base, kind, device, dtype, dense)
    lora.add_adapters(model, AdaptersSection(targets=("all",), rank=5), spec.TINY)
    stir(model)
    checkpointing.apply(model, policy, offload=False)
    return model.train()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", ["nf4", "bf16", "fp8"])
def test_loss_and_gradients_are_those_of_the_weights(bases, device, kind, policy):
    base = bases[kind] / "weights/base"
    found, wanted = (
        gradients(build(base, kind, device, dense, policy), device) for dense in ("fp8", "full")
    )
    assert len(found) == len(wanted) == 81
    for one, other in zip(found, wanted, strict=True):
        # CUDA's attention adds up its gradients in any order here.
        assert torch.equal(one, other) if device.type == "cpu" else relative(one, other) < 0.02


@pytest.mark.parametrize("kind", ["nf4", "bf16", "fp8"])
def test_codes_are_the_published_ones(checkpoint, bases, kind):
    source = {}
    for path in checkpoint.glob("*.safetensors"):
        source |= load_file(path)
    model = load_model(bases[kind] / "weights/base", kind, CPU, torch.float32, "fp8")
    parameters = dict(model.named_parameters())
    assert len(DENSE) == 8 * spec.TINY.layers
    for tensor in DENSE:
        name = tensor.transformers.removesuffix(".weight")
        codes, scale = parameters[f"{name}.codes"], parameters[f"{name}.scale_inv"]
        published = source[tensor.disk].view(torch.uint8)
        assert torch.equal(codes, published), tensor.disk
        assert torch.equal(scale, source[tensor.scale])
        assert f"{name}.weight" not in parameters


def test_a_base_from_the_native_layout(bases, tmp_path):
    with Base(bases["fp8"] / "weights/base") as origin:
        write_native(origin, tmp_path / "native")
    descale_directory(tmp_path / "native", tmp_path / "base", "bf16", "plain")
    found = load_model(tmp_path / "base", "bf16", CPU, torch.float32, "fp8")
    wanted = load_model(bases["bf16"] / "weights/base", "bf16", CPU, torch.float32, "fp8")
    for name, parameter in wanted.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), name


def test_weights_that_are_no_products_of_the_kept_scale_are_refused(bases, tmp_path):
    shutil.copytree(bases["bf16"] / "weights", tmp_path / "weights")
    manifest = tmp_path / "weights/base.json"
    content = json.loads(manifest.read_text())
    content["source_scales"][DENSE[3].scale] = [0.0123]
    manifest.write_text(json.dumps(content))
    with pytest.raises(Ms4Error) as caught:
        load_model(tmp_path / "weights/base", "bf16", CPU, torch.float32, "fp8")
    assert DENSE[3].disk in str(caught.value)
    assert "model.dense" in str(caught.value)
    load_model(tmp_path / "weights/base", "bf16", CPU, torch.float32, "full")


def test_a_layer_saves_nothing_and_computes_in_any_dtype():
    layer = FP8Linear(24, 40, Workspace.on(CPU))
    weight = (torch.randn(40, 24) * 0.02).to(torch.float8_e4m3fn)
    layer.codes = torch.nn.Parameter(weight.view(torch.uint8), requires_grad=False)
    layer.scale_inv = torch.nn.Parameter(torch.tensor(0.37).bfloat16(), requires_grad=False)
    exact = (weight.float() * layer.scale_inv.float()).bfloat16()
    kept = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(3, 5, 24, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
            y = layer(x)
        assert y.dtype == dtype
        assert torch.equal(y, x @ exact.to(dtype).T)
        g = torch.randn_like(y)
        assert torch.equal(torch.autograd.grad(y, x, g)[0], g @ exact.to(dtype))
    assert not kept
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_the_embedding_stays_on_the_host(bases, device):
    table = HostEmbedding(50, 8, torch.bfloat16)
    table.weight = torch.nn.Parameter(torch.randn(50, 8).bfloat16(), requires_grad=False)
    holder = torch.nn.Sequential(table).to(device).to(torch.float32)
    assert holder[0].weight.device == CPU
    assert holder[0].weight.dtype == torch.bfloat16
    tokens = torch.tensor([[0, 49, 7], [7, 7, 1]], device=device)
    rows = holder(tokens)
    assert rows.device.type == device.type
    assert torch.equal(rows.cpu(), table.weight[tokens.cpu()])
    if device.type == "cuda":
        model = load_model(bases["nf4"] / "weights/base", "nf4", device, torch.bfloat16, "fp8")
        assert {p.device.type for p in model.parameters()} == {"cpu", "cuda"}
        assert model.get_input_embeddings().weight.device == CPU
