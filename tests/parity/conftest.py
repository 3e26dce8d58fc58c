"""The bases made of the tiny checkpoint, once a session."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ms4 import config
from ms4.cli import run_stage


def settings(checkpoint: Path, **model):
    return config.check(
        {
            "model": {"source": str(checkpoint), **model},
            "data": {"train": ["train.jsonl"], "sequence_length": 64},
            "run": {"device": "cpu", "threads": 2},
        },
        "test",
    )


@pytest.fixture(scope="session")
def bases(checkpoint, tmp_path_factory) -> dict[str, Path]:
    """Project directories with a converted base, by the experts' storage, after the stages that
    make and verify it."""
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
def _two_threads():
    torch.set_num_threads(2)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm-wise error of a against the reference b."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """Each device that a numeric test runs on; CUDA under the mark `gpu`."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)
