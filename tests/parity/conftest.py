"""The bases made of the tiny checkpoint, once a session."""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from ms4 import config, spec
from ms4.cli import run_stage
from ms4.model import lora
from ms4.weights import configs, fp8
from ms4.weights.convert import descale_directory


def settings(checkpoint: Path, **model):
    return config.check(
        {
            "model": {"source": str(checkpoint), **model},
            "data": {"train": ["train.jsonl"], "sequence_length": 64},
            "run": {"device": "cpu", "threads": 1},
        },
        "test",
    )


def write_untaught(directory: Path) -> Path:
    """A checkpoint of the tiny model as it is initialized, in one shard, without a tokenizer."""
    torch.manual_seed(1)
    settings = configs.hf_config(spec.TINY)
    plain = {key: value for key, value in settings.items() if key != "quantization_config"}
    model = Mistral3ForConditionalGeneration._from_config(
        Mistral3Config(**plain | {"dtype": "float32"})
    )
    weights, held = dict(model.named_parameters()), {}
    for tensor in spec.tensors(spec.TINY):
        weight = weights[tensor.transformers].detach()
        if tensor.dtype == "F8_E4M3":
            held[tensor.disk], held[tensor.scale] = fp8.quantize(weight)
            name, shape = list(tensor.scales().items())[1]
            held[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            held[tensor.disk] = weight.bfloat16().contiguous()
    file = "model-00001-of-00001.safetensors"
    save_file(held, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(held, file)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def bases(request, tmp_path_factory) -> dict[str, Path]:
    """Project directories with a converted base, by the experts' storage, after the stages that
    make and verify it.

    A machine that has a GPU and no mistral-common gets the bases alone, of untaught weights: what
    the core computes on it is tested all the same.
    """
    if importlib.util.find_spec("mistral_common") is None:
        source = write_untaught(tmp_path_factory.mktemp("untaught"))
        made = {kind: tmp_path_factory.mktemp(kind) for kind in ("bf16", "nf4", "fp8")}
        for kind, directory in made.items():
            descale_directory(source, directory / "weights/base", kind, "plain")
        return made
    checkpoint = request.getfixturevalue("checkpoint")
    before = Path.cwd()
    made = {}
    for kind in ("bf16", "nf4", "fp8"):
        made[kind] = tmp_path_factory.mktemp(kind)
        os.chdir(made[kind])
        for stage in ("fetch", "descale", "verify"):
            run_stage(stage, settings(checkpoint, experts=kind))
    os.chdir(before)
    return made


@pytest.fixture
def project(bases, tmp_path, monkeypatch) -> Path:
    """A copy of the NF4 project that a test may spoil; the test runs in it."""
    shutil.copytree(bases["nf4"], tmp_path / "p", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "p")
    return tmp_path / "p"


def spoil(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a file of weights."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests run on each core already, and torch's threads wait for each other busily."""
    torch.set_num_threads(1)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm-wise error of a against the reference b."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def documents(lengths, seed=0):
    """Random tokens and masks of what is trained, half of them."""
    dice = np.random.default_rng(seed)
    return [
        (dice.integers(1000, 4096, n).astype(np.int32), (dice.random(n) < 0.5).astype(np.uint8))
        for n in lengths
    ]


def stir(model):
    """Non-zero B: an adapter that does something."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in lora.trainable(model).values():
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.add_(noise.to(parameter.device))


@pytest.fixture
def cuda() -> torch.device:
    """For tests of what only CUDA has; they bear the mark `gpu`."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """Each device that a numeric test runs on; CUDA under the mark `gpu`."""
    if request.param == "cuda":
        return request.getfixturevalue("cuda")
    return torch.device("cpu")
