"""The whole pipeline for real: through a hub on loopback, killed at will, with bad input."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ms4 import config
from tests.commands import CHECKOUT, run, snakemake, wait_for
from tests.hub import serve
from tests.projects import write_project

pytestmark = pytest.mark.slow

STAGES = config.STAGES
ADAPTER = "results/adapter/adapter_model.safetensors"


def make_project(root: Path, source: str, **train) -> Path:
    """A project over the demo's data, with a model that is hardly taught and a short run."""
    values = yaml.safe_load((CHECKOUT / "config/config.yaml").read_text())
    values["model"]["source"] = source
    values["train"] = {
        "steps": 8,
        "micro_batch": 2,
        "accumulation": 2,
        "checkpoint_every": 3,
        "learning_rate": 2e-3,
        **train,
    }
    values["evaluate"] = {"max_samples": 4, "max_new_tokens": 8, "batch": 4}
    write_project(root, values)
    shutil.copytree(CHECKOUT / "examples", root / "examples")
    lines = (root / "examples/seal/train.jsonl").read_text().splitlines(keepends=True)
    (root / "examples/seal/train.jsonl").write_text("".join(lines[:400]))
    return root


def ms4(*arguments: str, cwd: Path, env=None):
    return run(sys.executable, "-m", "ms4", *arguments, cwd=cwd, env=env)


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory) -> Path:
    """A finished project whose weights came over HTTP."""
    root = make_project(tmp_path_factory.mktemp("finished") / "project", "acme/tiny")
    with serve({"acme/tiny": checkpoint}) as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.url}
        done = snakemake("--profile", "local", cwd=root, env=env)
    assert done.returncode == 0, done.stdout
    (root / "output.txt").write_text(done.stdout)
    return root


def test_every_stage_leaves_its_manifest(finished):
    outputs = {
        "fetch": "weights/source.json",
        "descale": "weights/base.json",
        "verify": "results/verify.json",
        "preprocess": "results/data.json",
        "plan": "results/plan.json",
        "train": "results/train.json",
        "evaluate": "results/evaluation.json",
        "deliver": "results/deliver.json",
    }
    assert tuple(outputs) == STAGES
    for stage, path in outputs.items():
        manifest = json.loads((finished / path).read_text())
        assert manifest["stage"] == stage
    source = json.loads((finished / "weights/source.json").read_text())
    assert source["origin"] == "hub"


def test_the_run_ends_with_the_table_and_the_report(finished):
    output = (finished / "output.txt").read_text()
    assert "untuned → tuned" in output
    assert "results/report/report.html" in output
    rows = json.loads((finished / "results/evaluation.json").read_text())["rows"]
    assert len(rows) == 3 * 2 * 2
    assert {row["model"] for row in rows} == {"untuned", "tuned"}
    assert all(row["samples"] == 4 and row["loss"] > 0 for row in rows)


def test_metrics_are_one_line_a_step_and_the_loss_falls(finished):
    lines = (finished / "results/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(1, 9))
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["learning_rate"] < records[1]["learning_rate"]


def test_nothing_is_done_twice(finished):
    again = snakemake("--profile", "local", cwd=finished)
    assert again.returncode == 0
    assert "Nothing to be done" in again.stdout


def test_a_change_reruns_what_depends_on_it(finished, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(finished, root, symlinks=True)
    path = root / "config/config.yaml"
    values = yaml.safe_load(path.read_text())
    values["evaluate"]["max_samples"] = 3
    path.write_text(yaml.safe_dump(values))
    adapter = (root / ADAPTER).stat().st_mtime_ns
    done = snakemake("--profile", "local", cwd=root)
    assert done.returncode == 0, done.stdout
    assert (root / ADAPTER).stat().st_mtime_ns == adapter
    rows = json.loads((root / "results/evaluation.json").read_text())["rows"]
    assert all(row["samples"] == 3 for row in rows)


def test_the_adapter_loads_with_peft_onto_transformers_model(finished, checkpoint):
    from peft import PeftModel

    from tests.parity.test_model import reference

    tuned = PeftModel.from_pretrained(reference(checkpoint), finished / "results/adapter")
    tokens = torch.arange(1000, 1020)[None]
    with torch.no_grad():
        after = tuned(input_ids=tokens).logits
        with tuned.disable_adapter():
            before = tuned(input_ids=tokens).logits
    assert not torch.allclose(before, after)


@pytest.fixture(scope="module")
def prepared(checkpoint, tmp_path_factory) -> Path:
    """A project that is ready to train, and what an undisturbed run makes of it."""
    root = make_project(tmp_path_factory.mktemp("prepared") / "project", str(checkpoint), steps=9)
    for stage in STAGES[:5]:
        done = ms4(stage, cwd=root)
        assert done.returncode == 0, done.stdout
    calm = root.parent / "calm"
    shutil.copytree(root, calm, symlinks=True)
    assert ms4("train", cwd=calm).returncode == 0
    return root


def copy_of(prepared: Path, tmp_path: Path) -> tuple[Path, bytes, bytes]:
    root = tmp_path / "project"
    shutil.copytree(prepared, root, symlinks=True)
    calm = prepared.parent / "calm"
    return root, (calm / ADAPTER).read_bytes(), (calm / "results/train.json").read_bytes()


def metric_lines(root: Path) -> int:
    path = root / "results/metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill_and_finish(root: Path, moments: list[float]) -> None:
    """Start training, kill -9 it so many seconds after its first new step, repeat, finish."""
    for seconds in moments:
        process = subprocess.Popen(
            [sys.executable, "-m", "ms4", "train"], cwd=root, start_new_session=True
        )
        seen = metric_lines(root)
        wait_for(
            lambda p=process, n=seen: p.poll() is not None or metric_lines(root) != n, "a step"
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    done = ms4("train", cwd=root)
    assert done.returncode == 0, done.stdout


def test_kill_9_changes_nothing(prepared, tmp_path):
    """Killed early and late, between and in checkpoints: the same adapter, bit for bit."""
    root, adapter, manifest = copy_of(prepared, tmp_path)
    kill_and_finish(root, [0.0, 0.7])
    assert (root / ADAPTER).read_bytes() == adapter
    assert (root / "results/train.json").read_bytes() == manifest
    records = [json.loads(x) for x in (root / "results/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 10))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_kill_9_at_random_moments(prepared, tmp_path, seed):
    root, adapter, manifest = copy_of(prepared, tmp_path)
    kill_and_finish(root, [random.Random(seed).random() * 2 for _ in range(6)])
    assert (root / ADAPTER).read_bytes() == adapter
    assert (root / "results/train.json").read_bytes() == manifest


def test_a_damaged_checkpoint_is_not_taken_up(prepared, tmp_path):
    root, adapter, _ = copy_of(prepared, tmp_path)
    shutil.copytree(prepared.parent / "calm/checkpoints", root / "checkpoints")
    newest = sorted((root / "checkpoints").iterdir())[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    (root / "checkpoints/.step-000099.tmp").mkdir()
    done = ms4("train", cwd=root)
    assert "goes on from the checkpoint of step 6" in done.stdout
    assert (root / ADAPTER).read_bytes() == adapter


def test_sigterm_saves_a_checkpoint(prepared, tmp_path):
    root, adapter, _ = copy_of(prepared, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "ms4", "train"], cwd=root, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: metric_lines(root), "a step")
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate()
    assert process.returncode == 2
    assert "a checkpoint is saved" in message
    assert len(list((root / "checkpoints").glob("step-*"))) >= 1
    done = ms4("train", cwd=root)
    assert "goes on from the checkpoint" in done.stdout
    assert (root / ADAPTER).read_bytes() == adapter


def test_another_configuration_starts_anew(prepared, tmp_path):
    root, adapter, _ = copy_of(prepared, tmp_path)
    shutil.copytree(prepared.parent / "calm/checkpoints", root / "checkpoints")
    path = root / "config/config.yaml"
    values = yaml.safe_load(path.read_text())
    values["train"]["learning_rate"] = 1e-3
    path.write_text(yaml.safe_dump(values))
    refused = ms4("train", cwd=root)
    assert refused.returncode == 2
    assert "results/plan.json: made before the configuration was changed" in refused.stdout
    assert ms4("plan", cwd=root).returncode == 0
    done = ms4("train", cwd=root)
    assert done.returncode == 0
    assert "goes on" not in done.stdout
    assert (root / ADAPTER).read_bytes() != adapter


def test_kill_9_of_snakemake_then_resume(prepared, tmp_path, start):
    """The training lives on as an orphan; resume waits for it and goes on: one writer, same end."""
    root, adapter, _ = copy_of(prepared, tmp_path)
    values = yaml.safe_load((root / "config/config.yaml").read_text())
    process = start(sys.executable, "-m", "snakemake", "--profile", "local", cwd=root)
    wait_for(lambda: metric_lines(root), "a step of training", 300)
    process.kill()
    process.wait()
    blocked = ms4("train", cwd=root)
    assert blocked.returncode == 2
    assert "ms4 resume" in blocked.stdout
    resumed = ms4("resume", ".", cwd=root)
    assert resumed.returncode == 0, resumed.stdout
    assert "`ms4 train`" in resumed.stdout
    assert (root / "results/deliver.json").exists()
    assert (root / ADAPTER).read_bytes() == adapter
    assert values["train"]["steps"] == metric_lines(root)


def test_bf16_experts_without_expert_adapters(finished, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(finished, root, symlinks=True)
    path = root / "config/config.yaml"
    values = yaml.safe_load(path.read_text())
    values["model"]["experts"] = "bf16"
    values["train"]["checkpointing"] = "none"
    values["adapters"]["targets"] = ["attention"]
    path.write_text(yaml.safe_dump(values))
    done = snakemake("--profile", "local", cwd=root)
    assert done.returncode == 0, done.stdout
    base = json.loads((root / "weights/base/model.safetensors.index.json").read_text())
    assert not [name for name in base["weight_map"] if name.endswith(".absmax")]


def test_snakemake_shows_the_stages_message(prepared, tmp_path):
    root, _, _ = copy_of(prepared, tmp_path)
    train = root / "examples/seal/train.jsonl"
    train.write_text('{"messages": []}\n{oops\n' + train.read_text())
    done = snakemake("--profile", "local", cwd=root)
    assert done.returncode == 1
    assert "examples/seal/train.jsonl:1:" in done.stdout
    assert "examples/seal/train.jsonl:2:" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_budget_that_cannot_fit_says_what_would(prepared, tmp_path):
    root, _, _ = copy_of(prepared, tmp_path)
    path = root / "config/config.yaml"
    values = yaml.safe_load(path.read_text())
    values["run"]["memory_gib"] = 0.1
    path.write_text(yaml.safe_dump(values))
    done = ms4("plan", cwd=root)
    assert done.returncode == 2
    assert "the budget is 102.4 MiB (run.memory_gib)" in done.stdout
    assert "needs at least" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.skipif("MS4_TEST_DATA" not in os.environ, reason="MS4_TEST_DATA is not set")
def test_real_text(prepared, checkpoint, tmp_path):
    """GSM8K, a part of what benchmarks/gsm8k.py measures: to the end, and the loss falls."""
    sys.path.insert(0, str(CHECKOUT / "benchmarks"))
    try:
        from gsm8k import answers, convert
    finally:
        sys.path.pop(0)
    root, _, _ = copy_of(prepared, tmp_path)
    data = Path(os.environ["MS4_TEST_DATA"]) / "gsm8k"
    convert(data / "train.jsonl", root / "train.jsonl", 60)
    convert(data / "test.jsonl", root / "test.jsonl", 6)
    path = root / "config/config.yaml"
    values = config.load(path).model_dump(mode="json")
    answers(values, root, str(checkpoint))
    values["train"] |= {"epochs": 1, "steps": None}
    values["evaluate"]["max_new_tokens"] = 8
    values["run"]["threads"] = 1
    path.write_text(yaml.safe_dump(values))
    done = snakemake("--profile", "local", cwd=root)
    assert done.returncode == 0, done.stdout
    rows = json.loads((root / "results/evaluation.json").read_text())["rows"]
    losses = {(row["effort"], row["model"]): row["loss"] for row in rows}
    for effort in ("none", "high"):
        assert losses[effort, "tuned"] < losses[effort, "untuned"]
