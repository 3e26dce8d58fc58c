"""Fixtures of several test files: a project made of the pipeline's files, and processes in it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ms4 import config
from tests.commands import CHECKOUT, run
from tests.examples import examples as examples  # registers its profile before a test is read
from tests.projects import write_project
from tests.toy import make_toy

LONG = ("test_demo", "test_end_to_end", "test_resume", "test_slurm", "test_descale_kills")
"""Files that take a minute and more: each stays with one worker, so they begin first."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def _slurm_that_answers_or_none() -> Iterator[None]:
    """Where Slurm's programs find no controller, they find no cluster either.

    The Slurm plugin asks `scontrol` whenever Snakemake starts, and that waits nine seconds for a
    controller that is gone; without a configuration it fails at once.
    """
    with pytest.MonkeyPatch.context() as patch:
        if shutil.which("scontrol") and " UP" not in run("scontrol", "ping", cwd=CHECKOUT).stdout:
            patch.setenv("SLURM_CONF", os.devnull)
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after two steps: real files in FP8, weights that are not quite random."""
    from ms4 import tiny  # torch: only where a test wants it

    directory = tmp_path_factory.mktemp("checkpoint")
    tiny.build(directory, seed=1, threads=1, steps=2)
    return directory


@pytest.fixture
def demo_values() -> dict[str, Any]:
    """The demo's configuration as plain values; each test gets its own."""
    return config.load(CHECKOUT / "config/config.yaml").model_dump(mode="json")


@pytest.fixture
def project(tmp_path: Path, demo_values: dict[str, Any]) -> Path:
    """A project with the demo's configuration and a few conversations as its data."""
    root = write_project(tmp_path / "project", demo_values)
    for name in config.load(CHECKOUT / "config/config.yaml").data_files():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(_conversation(path.stem, number) for number in range(4)))
    return root


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A project whose one stage holds a lock until the file `go` is there; see tests/toy.py."""
    return make_toy(tmp_path / "toy")


def _conversation(name: str, number: int) -> str:
    turns = [
        {"role": "user", "content": f"{name} {number}"},
        {"role": "assistant", "content": f"{number} {name}"},
    ]
    return json.dumps({"messages": turns, "reasoning_effort": "none"}) + "\n"


@pytest.fixture
def edit() -> Callable[[Path, Callable[[dict[str, Any]], object]], None]:
    """Change a project's configuration by a function of its plain values."""

    def change(root: Path, how: Callable[[dict[str, Any]], object]) -> None:
        path = root / "config/config.yaml"
        values = config.load(path).model_dump(mode="json")
        how(values)
        path.write_text(yaml.safe_dump(values), encoding="utf-8")

    return change


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _kill_all_in(directories: set[Path]) -> None:
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and Path(process.cwd()) in directories:
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a command under `tmp_path`; when the test ends, it and its orphans are gone."""
    started: list[subprocess.Popen[str]] = []
    directories: set[Path] = set()

    def start_command(
        *command: str | Path,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> subprocess.Popen[str]:
        assert cwd.resolve().is_relative_to(tmp_path.resolve())
        with open(log, "w") if log else open(os.devnull, "w") as output:  # noqa: PTH123
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=cwd,
                env=env,
                text=True,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A shell starts background commands with SIGINT ignored, and children inherit that:
                # a test that sends it must not depend on how the tests were started.
                preexec_fn=_heed_interrupts,
            )
        started.append(process)
        directories.add(cwd.resolve())
        return process

    yield start_command
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
    _kill_all_in(directories)
