"""The tests marked `gpu` where there is no GPU, and on a machine that has what computes alone."""

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.commands import CHECKOUT

CORE = [
    f"tests/parity/test_{name}.py"
    for name in (
        *("gradients", "experts", "loss", "attention", "checkpointing", "optim"),
        *("load", "frozen", "traps", "adapters", "model"),
    )
]
LEAN = """
import sys
# Whoever imports one of these fails; find_spec says that it is not there.
class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("mistral_common", "textual", "snakemake"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "mistral_common" else real(name, *a)
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """A Python program whose pytest has no plugins: one of ours imports Textual."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=CHECKOUT,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.slow
def test_without_a_gpu_they_skip_and_say_why():
    done = run("-m", "pytest", "-m", "gpu", "-q", *CORE)
    assert done.returncode == 0, done.stdout
    assert "no CUDA device" in done.stdout
    assert re.search(r"^\d+ skipped, \d+ deselected", done.stdout, re.M), done.stdout


@pytest.mark.slow
def test_every_file_of_the_core_has_some():
    done = run("-c", LEAN, "-m", "gpu", "--collect-only", "-q", *CORE)
    assert done.returncode == 0, done.stdout
    for name in CORE:
        assert f"{name}::" in done.stdout, name


@pytest.mark.soak
def test_they_need_neither_tokenizer_nor_workflow():
    """The CPU's half of the same tests, without what a machine for computing may lack."""
    chosen = ["-k", "cpu and not reference and not peft and not dead", "-q", *CORE[:1], *CORE[4:]]
    done = run("-c", LEAN, "-m", "not soak", "-x", *chosen)
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"^\d\d+ passed", done.stdout, re.M), done.stdout[-4000:]
