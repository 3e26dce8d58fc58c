"""What may import what: the contracts in pyproject.toml, and a proof by a fresh interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.commands import CHECKOUT, run

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "matplotlib")
LIGHT = (
    "config",
    "spec",
    "device",
    "plan",
    "manifest",
    "lock",
    "resume",
    "cli",
    "data",
    "weights.hub",
)

PROOF = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(*sorted(name for name in sys.argv[2:] if name in sys.modules))
"""


def light_modules() -> list[str]:
    """Each module that must not load torch; packages with all that they hold."""
    found = []
    for name in LIGHT:
        path = CHECKOUT / "workflow/ms4" / name.replace(".", "/")
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        found += [dotted(file, CHECKOUT / "workflow") for file in files]
    wizard = sorted((CHECKOUT / "tui/ms4_wizard").rglob("*.py"))
    return found + [dotted(file, CHECKOUT / "tui") for file in wizard]


def dotted(file: Path, root: Path) -> str:
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def test_the_list_is_not_empty() -> None:
    assert {"ms4.config", "ms4.data.dataset", "ms4.weights.hub", "ms4_wizard"} <= set(
        light_modules()
    )


@pytest.mark.slow
@pytest.mark.parametrize("module", light_modules())
def test_loads_nothing_heavy(module: str) -> None:
    answer = run(sys.executable, "-c", PROOF, module, *HEAVY, cwd=CHECKOUT)
    assert answer.returncode == 0, answer.stdout
    assert answer.stdout.split() == []


@pytest.mark.slow
def test_nothing_below_the_wizard_loads_textual() -> None:
    answer = run(sys.executable, "-c", PROOF, "ms4.cli", "textual", "ms4_wizard", cwd=CHECKOUT)
    assert answer.stdout.split() == [], answer.stdout


@pytest.mark.slow
def test_contracts() -> None:
    answer = run(Path(sys.executable).parent / "lint-imports", cwd=CHECKOUT)
    assert answer.returncode == 0, answer.stdout
    assert "0 broken" in answer.stdout
