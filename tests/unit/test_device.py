"""The device as it is seen without torch. nvidia-smi is a program on the path, and so is ours."""

import re
from pathlib import Path

import pytest

from ms4 import config, device
from ms4.device import GIB
from ms4.errors import Ms4Error


def make(**sections):
    return config.check({"data": {"train": ["train.jsonl"]}, **sections}, "test")


@pytest.fixture
def nvidia(tmp_path, monkeypatch):
    def install(answer, code=0):
        tool = tmp_path / "bin/nvidia-smi"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(
            f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat <<E\n{answer}\nE\nexit {code}\n'
        )
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return install


def test_gpu(nvidia, monkeypatch, tmp_path):
    nvidia("143771, NVIDIA H200\n81559, NVIDIA H100")
    found = device.find_device(make())
    assert (found.kind, found.name, found.total) == ("cuda", "NVIDIA H200", 143771 * 2**20)
    assert "--query-gpu=memory.total,name" in (tmp_path / "asked").read_text()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    device.find_device(make())
    assert "--id=3" in (tmp_path / "asked").read_text()
    assert device.find_device(make(run={"device": "cpu"})).kind == "cpu"


@pytest.mark.parametrize(
    ("answer", "code", "visible", "why"),
    [
        ("NVIDIA-SMI has failed", 9, None, "finds no GPU (NVIDIA-SMI has failed)"),
        ("[N/A], NVIDIA GB10", 0, None, "no memory size for NVIDIA GB10"),
        ("143771, NVIDIA H200", 0, "", "CUDA_VISIBLE_DEVICES hides"),
        ("143771, NVIDIA H200", 0, "-1", "CUDA_VISIBLE_DEVICES hides"),
    ],
)
def test_no_usable_gpu(nvidia, monkeypatch, answer, code, visible, why):
    nvidia(answer, code)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = device.find_device(make())
    assert found.kind == "cpu"
    assert why in found.reason
    with pytest.raises(Ms4Error, match=re.escape(why)):
        device.find_device(make(run={"device": "cuda"}))
    configured = device.find_device(make(run={"device": "cuda", "memory_gib": 80}))
    assert (configured.kind, configured.free) == ("cuda", 80 * GIB)


def test_no_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = device.find_device(make())
    assert found.kind == "cpu"
    assert 0 < found.free <= found.total


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_limits_of_control_groups(monkeypatch, tmp_path, name):
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    controllers = "memory" if "/" in name else ""
    if controllers not in [line.split(":")[1] for line in lines]:
        pytest.skip("this machine has the other version of control groups")
    limit = tmp_path / name
    limit.parent.mkdir(exist_ok=True)
    limit.write_text(f"{GIB}\n")
    monkeypatch.setattr(device, "CGROUPS", tmp_path)
    found = device.find_device(make(run={"device": "cpu"}))
    assert found.total == GIB
    assert found.free <= GIB
    limit.write_text("max\n")
    assert device.find_device(make(run={"device": "cpu"})).total > GIB
