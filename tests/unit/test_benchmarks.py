"""What benchmarks share: records whose parts keep their dates, and what is said to be skipped."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("common")
    monkeypatch.setattr(module, "RECORDS", tmp_path)
    return module


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "MS4_TEST_DATA"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=BENCHMARKS.parent,
        env={**environment, **variables},
        check=False,
        capture_output=True,
        text=True,
    )


def test_a_part_keeps_its_date_and_machine(
    common: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {"date": "2020-01-02", "machine": {"cpu": "old"}, "result": {"a": 1, "b": 2}}
    (tmp_path / "2020-01-02-x.json").write_text(json.dumps(old))
    monkeypatch.setattr(common, "_today", lambda: "2020-02-03")
    common.record_part("x", "c", "b", 3)
    monkeypatch.setattr(common, "_today", lambda: "2020-03-04")
    common.record_part("x", "c", "c", 4)
    made = json.loads((tmp_path / "2020-03-04-x.json").read_text())
    assert made["result"] == {"a": 1, "b": 3, "c": 4}
    dates = {part: when["date"] for part, when in made["measured"].items()}
    assert dates == {"a": "2020-01-02", "b": "2020-02-03", "c": "2020-03-04"}
    assert made["measured"]["a"]["machine"] == {"cpu": "old"}
    assert made["measured"]["c"]["machine"] == common.machine()
    assert json.loads((tmp_path / "2020-01-02-x.json").read_text()) == old


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("data.py", "trl"), "trl: needs --trl PYTHON, a Python of a virtual environment that has"),
        (("data.py", "trl", "--trl", "/none/python"), "--trl /none/python: no such file"),
        (("data.py", "encod"), "encod: no part; there are encode, scaling, memory and trl"),
        (("weights.py", "kernels"), "kernels: no part of this benchmark; it has kernel, descale"),
        (("data.py", "encode"), "encode: MS4_TEST_DATA is not set; it names the directory"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_runs(
    arguments: tuple[str, ...], message: str
) -> None:
    done = run(f"benchmarks/{arguments[0]}", *arguments[1:])
    assert done.returncode
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("script", "skipped"), [("data", "encode, scaling, memory"), ("gsm8k", "gsm8k")]
)
def test_without_public_data_the_rest_of_make_bench_goes_on(script: str, skipped: str) -> None:
    done = run(f"benchmarks/{script}.py")
    assert done.returncode == 0
    assert done.stdout.startswith(f"skipped: {skipped}: MS4_TEST_DATA is not set")


def test_make_bench_runs_benchmarks_and_nothing_else() -> None:
    made = subprocess.run(
        ["make", "-n", "bench"],
        cwd=BENCHMARKS.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    line = next(line for line in made.stdout.splitlines() if "for script in" in line)
    scripts = line.partition(" in ")[2].partition(";")[0].split()
    assert {"benchmarks/data.py", "benchmarks/weights.py", "benchmarks/demo.py"} <= {*scripts}
    assert not {f"benchmarks/{name}.py" for name in ("common", "stacks", "synthetic", "gpu")} & {
        *scripts
    }
    for script in scripts:
        assert 'if __name__ == "__main__":' in (BENCHMARKS.parent / script).read_text()
