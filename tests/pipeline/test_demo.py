"""What the README promises of the demo, with the model taught as the demo teaches it."""

import json
import sys

import pytest

from ms4 import tiny_text
from tests.commands import CHECKOUT, run, snakemake


def test_the_committed_examples_are_what_the_generator_makes():
    for name, records in tiny_text.examples().items():
        wanted = "".join(tiny_text.lines(records))
        assert (CHECKOUT / "examples/seal" / name).read_text(encoding="utf-8") == wanted


def test_no_held_out_problem_occurs_in_training():
    made = tiny_text.examples()
    questions = {
        name: {record["messages"][0]["content"] for record in records}
        for name, records in made.items()
    }
    train = questions.pop("train.jsonl")
    assert all(not train & held_out for held_out in questions.values())


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_demo_learns_and_keeps(tmp_path):
    """The way of `make demo`: answers, project, pipeline; on one thread, since two that wait for
    each other beside another test take twice as long."""
    root = tmp_path / "demo"
    wizard = (sys.executable, "-m", "ms4_wizard", "--answers", "examples/answers.yaml", root)
    written = run(*wizard, "--set", "run.threads=1", cwd=CHECKOUT)
    assert written.returncode == 0, written.stdout
    done = snakemake("--profile", "local", cwd=root, timeout=2300)
    assert done.returncode == 0, done.stdout
    rows = json.loads((root / "results/evaluation.json").read_text())["rows"]
    found = {(row["set"], row["effort"], row["model"]): row for row in rows}
    for effort in ("none", "high"):
        before, after = (found["seal", effort, model] for model in ("untuned", "tuned"))
        assert before["exact_match"] < 0.2
        assert after["exact_match"] >= 0.6
        assert after["loss"] <= before["loss"] / 2
        for kept in ("chat", "copy"):
            assert found[kept, effort, "tuned"]["exact_match"] > 0.9
    assert '"verdict": "pass"' in (root / "results/evaluation.json").read_text()
