"""Loading a base: bit for bit what is stored, without a second copy, and only what belongs."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from ms4 import spec
from ms4.errors import Ms4Error
from ms4.model.build import load_model
from ms4.weights.convert import descale_directory
from tests.commands import CHECKOUT, PEAK

from . import by_hand

CPU = torch.device("cpu")


def stored(base):
    tensors = {}
    for path in base.glob("*.safetensors"):
        tensors.update(load_file(path))
    return tensors


def in_the_model(name):
    """Where the model has a base's tensor: by the table's names, but for the packed experts; None
    for the scale of a dense tensor, which is used up."""
    for tensor in spec.tensors(spec.TINY):
        if name == tensor.disk:
            return tensor.transformers + (".weight" if tensor.role == "experts" else "")
        if name.startswith(tensor.disk + "."):
            return tensor.transformers + name.removeprefix(tensor.disk)
        if name in tensor.scales():
            return f"{tensor.transformers}.scale_inv" if tensor.role == "experts" else None
    raise AssertionError(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bf16", "nf4", "fp8"])
def test_every_parameter_is_the_stored_one(bases, kind, dtype):
    base = bases[kind] / "weights/base"
    model = load_model(base, kind, CPU, dtype)
    found, wanted = dict(model.named_parameters()), {}
    held = stored(base)
    for name, tensor in held.items():
        place = in_the_model(name)
        if tensor.dtype == torch.float8_e4m3fn:
            if ".mlp.experts." in name:  # the codes themselves
                place, tensor = place.removesuffix(".weight") + ".codes", tensor.view(torch.uint8)
            else:
                tensor = by_hand.product(tensor, held[f"{name}_scale_inv"])
        if place is not None:
            wanted[place] = tensor
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        parameter = found[name]
        packed = ".mlp.experts." in name
        assert parameter.dtype == (tensor.dtype if packed else dtype)
        assert torch.equal(parameter, tensor.to(parameter.dtype)), name
        assert not parameter.requires_grad
    assert not any(buffer.is_meta for buffer in model.buffers())


def copy(base, target, change):
    """A copy of a base with one file's tensors changed."""
    for path in base.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    held = load_file(target / "layer-02.safetensors")
    change(held)
    save_file(held, target / "layer-02.safetensors")
    return target


NORM = "language_model.model.layers.2.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop(NORM), rf"1 missing \({NORM}\)"),
        (lambda held: held.update(more=torch.zeros(2)), r"1 unexpected \(more\)"),
        (lambda held: held.update({NORM: torch.zeros(7)}), rf"1 of another shape \({NORM}\)"),
    ],
)
def test_what_is_not_the_models_is_named(bases, tmp_path, change, message):
    base = copy(bases["nf4"] / "weights/base", tmp_path, change)
    with pytest.raises(Ms4Error, match=message):
        load_model(base, "nf4", CPU, torch.float32)


def test_a_scale_that_is_missing_is_named(bases, tmp_path):
    scale = "language_model.model.layers.2.self_attn.o_proj.weight_scale_inv"
    base = copy(bases["fp8"] / "weights/base", tmp_path, lambda held: held.pop(scale))
    with pytest.raises(Ms4Error, match=rf"1 missing \({scale}\)"):
        load_model(base, "fp8", CPU, torch.float32)


def test_another_activation_is_refused(bases, tmp_path):
    base = copy(bases["nf4"] / "weights/base", tmp_path, lambda held: None)
    settings = base / "config.json"
    settings.write_text(settings.read_text().replace('"silu"', '"gelu"'))
    with pytest.raises(Ms4Error, match=r"hidden_act is 'gelu'; the experts .* have `silu`"):
        load_model(base, "nf4", CPU, torch.float32)


def test_a_file_that_is_cut_short_is_named(bases, tmp_path):
    base = copy(bases["nf4"] / "weights/base", tmp_path, lambda held: None)
    path = base / "layer-02.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(Ms4Error, match=r"layer-02\.safetensors.*cut short"):
        load_model(base, "nf4", CPU, torch.float32)


MEASURE = f"""{PEAK}
import json, sys
from pathlib import Path
import torch
from ms4.model.build import load_model

load_model(Path(sys.argv[1]), "nf4", torch.device("cpu"), torch.bfloat16)
before = peak()
model = load_model(Path(sys.argv[2]), "nf4", torch.device("cpu"), torch.bfloat16)
held = sum(p.nbytes for p in model.parameters())
print(json.dumps([held, peak() - before]))
"""


@pytest.mark.slow
def test_there_is_no_second_copy_in_memory(bases, tmp_path):
    """Peak memory of loading 0.5 GB grows by that, and by some stretches that are on their way."""
    sys.path.insert(0, str(CHECKOUT / "benchmarks"))
    try:
        import synthetic
    finally:
        sys.path.pop(0)
    dims = synthetic.dimensions(1, experts=16)
    synthetic.write_checkpoint(tmp_path / "source", dims)
    descale_directory(tmp_path / "source", tmp_path / "base", "nf4", "plain")
    small, large = bases["nf4"] / "weights/base", tmp_path / "base"
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, small, large], capture_output=True, text=True, check=True
    )
    held, grown = json.loads(done.stdout.splitlines()[-1])
    assert held > 4e8
    assert grown < held + 1.5e8
