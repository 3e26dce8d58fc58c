"""What is found of a machine: programs on the path are ours, or a real Slurm's."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ms4_wizard import machine
from ms4_wizard.machine import FoundGpu, Partition

Install = Callable[..., None]
CLUSTER = """gpu*|up|2-00:00:00|4|96|1031000+|gpu:h200:8(S:0-1)
gpu*|up|2-00:00:00|2|64|515000|gpu:h100:4,tmpdisk:1
long|down|infinite|10|128+|257000|(null)
old|up|30:00|1|8|64000|gpu:2
"""
RULES = """PartitionName=gpu AllowGroups=ALL AllowAccounts=physics,bio AllowQos=ALL MaxTime=2-0
PartitionName=long AllowGroups=ALL AllowAccounts=ALL State=DOWN
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Programs of the path, by name: nothing else is installed."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in ("sh", "cat", "sleep"):
        (directory / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(directory))

    def install(name: str, answer: str = "", code: int = 0, before: str = "") -> None:
        tool = directory / name
        tool.write_text(f"#!/bin/sh\n{before}\ncat <<'E'\n{answer}\nE\nexit {code}\n")
        tool.chmod(0o755)

    return install


def test_a_machine_without_anything(programs: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    found = machine.look()
    assert found.cores == len(os.sched_getaffinity(0))
    assert found.cpu
    assert 0 < found.available_gib <= found.memory_gib
    assert (found.gpus, found.cuda, found.slurm) == ((), None, None)
    assert found.gpu_fault == "nvidia-smi is not installed here"


def test_gpus(programs: Install) -> None:
    table = "| NVIDIA-SMI 570.1   Driver Version: 570.1   CUDA Version: 12.8     |"
    gpus = "143771, NVIDIA H200\n[N/A], NVIDIA GB10"
    programs("nvidia-smi", gpus, before=f'[ $# -gt 0 ] || {{ echo "{table}"; exit; }}')
    found = machine.look()
    assert found.gpus == (FoundGpu("NVIDIA H200", 143771 / 1024), FoundGpu("NVIDIA GB10", None))
    assert (found.cuda, found.gpu_fault) == ("12.8", None)
    programs("nvidia-smi", "NVIDIA-SMI has failed", 9)
    found = machine.look()
    assert (found.gpus, found.gpu_fault) == ((), "nvidia-smi: NVIDIA-SMI has failed")
    programs("nvidia-smi")
    assert machine.look().gpu_fault == "nvidia-smi lists no GPU"


def test_a_cluster(programs: Install) -> None:
    programs("sinfo", CLUSTER)
    programs("scontrol", RULES)
    programs("sacctmgr", "physics\nphysics\nchem")
    found = machine.find_slurm()
    assert found is not None
    assert found.accounts == ("physics", "chem")
    assert found.fault is None
    assert found.partitions == (
        Partition(
            *("gpu", True, True, 6, ("h200 × 8", "h100 × 4"), 64, 515000 / 1024, "2-00:00:00"),
            ("physics", "bio"),
        ),
        Partition("long", False, False, 10, (), 128, 257000 / 1024, None, None),
        Partition("old", False, True, 1, ("GPU × 2",), 8, 64000 / 1024, "30:00", None),
    )
    assert [partition.name for partition in found.with_gpus] == ["gpu", "old"]


def test_a_cluster_without_accounts(programs: Install) -> None:
    programs("sinfo", CLUSTER)
    programs("scontrol", "", 1)
    programs("sacctmgr", "You are not running a supported accounting_storage plugin", 1)
    found = machine.find_slurm()
    assert found is not None
    assert (found.accounts, len(found.partitions)) == ((), 3)


def test_a_dead_controller_blocks_nobody(
    programs: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its programs would wait for a minute here; all three are left at once."""
    monkeypatch.setattr(machine, "SLURM_S", 0.3)
    for name in ("sinfo", "scontrol", "sacctmgr"):
        programs(name, CLUSTER, before="exec sleep 60")
    found = machine.find_slurm()
    assert found == machine.Slurm(fault="sinfo does not answer")


@pytest.mark.parametrize(
    ("answer", "code", "fault"),
    [("slurm_load_partitions: no", 1, "sinfo: slurm_load_partitions: no"), ("", 1, "without a wo")],
)
def test_a_cluster_that_refuses(programs: Install, answer: str, code: int, fault: str) -> None:
    programs("sinfo", answer, code)
    found = machine.find_slurm()
    assert found is not None
    assert fault in str(found.fault)
    programs("sinfo", "nonsense")
    empty = machine.find_slurm()
    assert empty == machine.Slurm(fault="it has no partition")


def test_a_token_is_found_and_never_read(tmp_path: Path) -> None:
    find = machine.find_token
    assert find({"HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path)}) == "HF_TOKEN"
    assert find({"HF_TOKEN": " ", "HF_HOME": str(tmp_path)}) is None
    (tmp_path / "token").touch()
    assert find({"HF_HOME": str(tmp_path)}) is None
    (tmp_path / "token").write_text("hf_secret")
    assert find({"HF_HOME": str(tmp_path)}) == str(tmp_path / "token")
    assert find({"HF_TOKEN_PATH": str(tmp_path / "token")}) == str(tmp_path / "token")
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface/token").write_text("hf_secret")
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    assert find(cache) == str(tmp_path / "huggingface/token")


def test_room_of_a_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    assert machine.free(tmp_path / "a/b/c") == pytest.approx(
        shutil.disk_usage(tmp_path).free, rel=0.01
    )


@pytest.mark.parametrize(
    ("limit", "hours"),
    [
        *(("2-12:00:00", 60), ("12:30:00", 12), ("90:00", 1), ("120", 2), ("30", None)),
        *((None, None), ("UNLIMITED", None), ("1-00", 24)),
    ],
)
def test_hours_of_a_limit(limit: str | None, hours: int | None) -> None:
    assert machine.hours(limit) == hours


@pytest.mark.slurm
def test_a_real_cluster() -> None:
    """The one node that tests/slurm/start_slurm.sh starts."""
    try:
        alive = subprocess.run(["scontrol", "ping"], capture_output=True, timeout=30, check=False)
        up = b" UP" in alive.stdout
    except (FileNotFoundError, subprocess.TimeoutExpired):
        up = False
    if not up:
        assert not os.environ.get("CI"), "CI starts a controller"
        pytest.skip("no Slurm controller answers")
    found = machine.find_slurm()
    assert found is not None
    (partition,) = found.partitions
    assert (partition.name, partition.default, partition.up) == ("gpu", True, True)
    assert (partition.nodes, partition.gpus) == (1, ("h200 × 2",))
    assert (partition.limit, partition.accounts, found.accounts) == (None, None, ())
