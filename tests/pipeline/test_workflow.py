"""The pipeline as Snakemake sees it: dry runs, refusals, and what a change reruns."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ms4.config import STAGES
from tests.commands import CHECKOUT, run, snakemake

Edit = Callable[[Path, Callable[[dict[str, Any]], object]], None]

DATA = [f"examples/seal/{name}.jsonl" for name in ("train", "seal", "chat", "copy")]
READS = {
    "fetch": [],
    "descale": ["weights/source.json"],
    "verify": ["weights/source.json", "weights/base.json"],
    "preprocess": ["weights/source.json", *DATA],
    "plan": ["weights/source.json", "results/data.json"],
    "train": ["weights/base.json", "results/verify.json", "results/data.json", "results/plan.json"],
    "evaluate": ["weights/base.json", "results/train.json", "results/data.json"],
    "deliver": [
        "weights/source.json",
        "weights/base.json",
        "results/verify.json",
        "results/data.json",
        "results/plan.json",
        "results/train.json",
        "results/evaluation.json",
    ],
}
WRITES = {
    "fetch": "weights/source.json",
    "descale": "weights/base.json",
    "verify": "results/verify.json",
    "preprocess": "results/data.json",
    "plan": "results/plan.json",
    "train": "results/train.json",
    "evaluate": "results/evaluation.json",
    "deliver": "results/deliver.json",
}


def jobs(output: str) -> dict[str, dict[str, str]]:
    """The jobs of a dry run: rule → what is printed about it."""
    found = {}
    for block in re.split(r"\n(?=(?:local)?rule )", output)[1:]:
        name = re.match(r"(?:local)?rule (\w+):", block)
        assert name is not None
        found[name[1]] = dict(re.findall(r"^    (\w+): (.*)$", block, re.MULTILINE))
        command = re.search(r"^Shell command: (.*)$", block, re.MULTILINE)
        found[name[1]]["shell"] = command[1] if command else ""
    return found


@pytest.mark.parametrize(
    "profile",
    [
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(["--profile", "local"], marks=pytest.mark.slow),
        ["--profile", "slurm"],
    ],
)
def test_dry_run(project: Path, profile: list[str]) -> None:
    answer = snakemake(*profile, "-n", cwd=project)
    assert answer.returncode == 0, answer.stdout
    found = jobs(answer.stdout)
    assert set(found) == {*STAGES, "all"}
    for stage in STAGES:
        job = found[stage]
        assert [name for name in job.get("input", "").split(", ") if name] == READS[stage]
        assert job["output"] == WRITES[stage]
        assert job["log"] == f"logs/{stage}.log"
        assert job["shell"] == f"ms4 {stage} --config config/config.yaml"
    assert found["all"]["input"] == "results/deliver.json"


@pytest.mark.slow
@pytest.mark.parametrize("profile", [[], ["--profile", "local"], ["--profile", "slurm"]])
def test_dry_run_in_the_checkout(profile: list[str]) -> None:
    answer = snakemake(*profile, "-n", cwd=CHECKOUT)
    assert answer.returncode == 0, answer.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("device", "gpus"), [("cpu", "0"), ("auto", "1"), ("cuda", "1")])
def test_only_stages_that_may_use_a_gpu_ask_for_one(
    project: Path, edit: Edit, device: str, gpus: str
) -> None:
    edit(project, lambda values: values["run"].update(device=device))
    found = jobs(snakemake("-n", cwd=project).stdout)
    asked = {
        stage: match[1]
        for stage in STAGES
        if (match := re.search(r"\bgpu=(\d+)", found[stage]["resources"]))
    }
    assert asked == dict.fromkeys(["plan", "train", "evaluate"], gpus)


@pytest.mark.slow
def test_the_real_model_asks_for_more(project: Path, edit: Edit) -> None:
    def memory(stage: str) -> int:
        match = re.search(
            r"mem_mb=(\d+)", jobs(snakemake("-n", cwd=project).stdout)[stage]["resources"]
        )
        assert match is not None
        return int(match[1])

    assert memory("train") == 4000
    edit(
        project, lambda values: values["model"].update(source="mistralai/Mistral-Small-4-119B-2603")
    )
    assert memory("train") == 64000


# Refusals: exit code 1, what is wrong, no traceback of ours.


def test_config_error_is_shown(project: Path) -> None:
    file = project / "config/config.yaml"
    file.write_text(file.read_text().replace("seed: 0", "sed: 0"))
    answer = snakemake("-n", cwd=project)
    assert answer.returncode == 1
    assert re.search(
        r"config/config\.yaml:\d+: sed: unknown key; did you mean `seed`\?", answer.stdout
    )
    assert "Traceback" not in answer.stdout


@pytest.mark.slow
def test_missing_config_is_shown(project: Path) -> None:
    (project / "config/config.yaml").unlink()
    answer = snakemake("-n", cwd=project)
    assert answer.returncode == 1
    assert "config/config.yaml: no such configuration file." in answer.stdout


@pytest.mark.slow
@pytest.mark.parametrize("option", [["--config", "seed=1"], ["--configfile", "config/config.yaml"]])
def test_settings_on_the_command_line_are_refused(project: Path, option: list[str]) -> None:
    answer = snakemake("-n", *option, cwd=project)
    assert answer.returncode == 1
    assert "--config and --configfile are not read (given: " in answer.stdout
    assert "Settings belong in config/config.yaml; edit them there." in answer.stdout


def test_missing_data_file_is_named(project: Path) -> None:
    (project / DATA[1]).unlink()
    answer = snakemake("-n", cwd=project)
    assert answer.returncode == 1
    assert DATA[1] in answer.stdout


@pytest.mark.slow
def test_snakemake_without_ms4(project: Path) -> None:
    """Another environment's Snakemake says what is missing, not which line failed to import."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    hidden = project.parent / "hidden"
    (hidden / "ms4").mkdir(parents=True)
    (hidden / "ms4/__init__.py").touch()  # a package of that name, without our modules
    answer = snakemake("-n", cwd=project, env=env | {"PYTHONPATH": str(hidden)})
    assert answer.returncode == 1
    assert f"is not installed in the Python that runs Snakemake, {sys.executable}" in answer.stdout


@pytest.mark.slow
def test_snakemake_without_activation(project: Path, edit: Edit) -> None:
    """`.venv/bin/snakemake` finds the `ms4` beside it; its failure, and its log, reach the user."""
    edit(project, lambda values: values["model"].update(source="./nowhere"))
    env = os.environ | {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    binary = Path(sys.executable).parent / "snakemake"
    answer = run(binary, "--profile", "local", "weights/source.json", cwd=project, env=env)
    assert answer.returncode == 1
    log = (project / "logs/fetch.log").read_text()
    assert log.startswith("ms4 fetch: ")
    assert "nowhere" in log
    assert log.strip() in answer.stdout


# What a change reruns. Snakemake's own records are made by `--touch` over empty outputs.


@pytest.fixture
def finished(project: Path) -> Path:
    """A project whose stages have all run, as far as Snakemake knows."""
    for name in WRITES.values():
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"made": "{name}"}}\n')
    answer = snakemake("--touch", "--cores", "1", "--forceall", cwd=project)
    assert answer.returncode == 0, answer.stdout
    answer = snakemake("-n", cwd=project)
    assert "Nothing to be done" in answer.stdout, answer.stdout
    return project


def reruns(root: Path) -> set[str]:
    """The stages that Snakemake would run, as far as it can know before it has run any."""
    answer = snakemake("-n", cwd=root)
    assert answer.returncode == 0, answer.stdout
    return set(jobs(answer.stdout)) - {"all"}


@pytest.mark.slow
def test_what_a_change_of_the_configuration_reruns(finished: Path, edit: Edit) -> None:
    last = {"train", "evaluate", "deliver"}
    changes: list[tuple[Callable[[dict[str, Any]], object], set[str]]] = [
        (lambda v: v.update(seed=1), set(STAGES)),
        (lambda v: v["model"].update(softmax_scale="yarn"), {"descale", "verify", *last}),
        (lambda v: v["data"].update(too_long="drop"), {"preprocess", "plan", *last}),
        (lambda v: v["train"].update(learning_rate=1e-5), {"plan", *last}),
        (lambda v: v["evaluate"].update(max_samples=3), {"evaluate", "deliver"}),
    ]
    file = finished / "config/config.yaml"
    before = file.read_text()
    for change, stages in changes:
        edit(finished, change)
        assert reruns(finished) == stages
        file.write_text(before)
    file.write_text(f"# a remark\n{before}")
    assert reruns(finished) == set()


@pytest.mark.slow
def test_what_a_change_of_the_data_reruns(finished: Path) -> None:
    data = finished / DATA[0]
    os.utime(data)
    assert reruns(finished) == set(), "the same bytes, touched"
    data.write_text(data.read_text() + "\n")
    assert reruns(finished) == {"preprocess", "plan", "train", "evaluate", "deliver"}


@pytest.mark.slow
def test_a_manifest_that_the_user_was_told_to_remove(finished: Path) -> None:
    """`check_files` says so when a later stage finds damage; that stage has no output then."""
    for stage in ("train", "evaluate", "deliver"):
        (finished / WRITES[stage]).unlink()
    (finished / WRITES["descale"]).unlink()
    assert reruns(finished) == {"descale", "verify", "train", "evaluate", "deliver"}
