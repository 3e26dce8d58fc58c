"""A place to write projects in: a directory with data, which is the current one."""

from __future__ import annotations

from pathlib import Path

import pytest

from ms4_wizard.answers import Answers
from ms4_wizard.machine import Known, Machine, Partition, Slurm

DATA = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


MACHINE = Machine(
    cpu="AMD EPYC 9654",
    cores=96,
    memory_gib=755,
    available_gib=701,
    disk_gib=4321,
    gpu_fault="nvidia-smi is not installed here",
    token_in="HF_TOKEN",  # noqa: S106 - where one is, not what it is
    slurm=Slurm(
        (
            Partition("gpu", True, True, 4, ("h200 × 8",), 96, 1007, "2-00:00:00", ("physics",)),
            Partition("short", False, True, 2, ("l40s × 4",), 64, 503, "04:00:00", None),
            Partition("cpu", False, True, 40, (), 128, 251, None, None),
        ),
        ("physics", "chem"),
    ),
)


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The screens show the same machine wherever the tests run."""
    monkeypatch.setattr(Known, "machine", MACHINE)
    monkeypatch.setattr(Known, "at", classmethod(lambda cls, place: cls.machine))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with `train.jsonl` and `sets/test.jsonl`."""
    (tmp_path / "sets").mkdir()
    for name in ("train.jsonl", "sets/test.jsonl"):
        (tmp_path / name).write_text(DATA)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def answers() -> Answers:
    """Answers of which each part has something to say."""
    return Answers.model_validate(
        {
            "model": {"source": "tiny"},
            "data": {"train": ["train.jsonl"], "test": {"held": "sets/test.jsonl"}},
            "adapters": {"rank": 8},
            "run": {"device": "cpu", "threads": 2},
            "where": {"run": "slurm", "partition": "input", "account": "007", "hours": 12},
        }
    )


def contents(root: Path) -> dict[str, bytes | str]:
    """Every file and link under a directory."""
    found: dict[str, bytes | str] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_file():
            found[name] = path.read_bytes()
    return found
