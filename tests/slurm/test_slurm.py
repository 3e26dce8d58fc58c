"""The pipeline on a real Slurm of one node, which tests/slurm/start_slurm.sh starts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ms4.data.tekken import write_tekken
from ms4_wizard import emit
from ms4_wizard.answers import Answers
from tests.commands import run, wait_for, without_slurm_job
from tests.fetching import make_checkpoint
from tests.toy import runs

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

Start = Callable[..., "subprocess.Popen[str]"]
Edit = Callable[[Path, Callable[[dict[str, Any]], object]], None]

# The profile as it is, but the first look at a job after 1 s instead of 40 s.
SNAKEMAKE = (
    *(sys.executable, "-m", "snakemake", "--profile", "slurm"),
    *("--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "10"),
)


@pytest.fixture(autouse=True, scope="module")
def controller() -> None:
    """A controller must answer. Only outside CI may there be none."""
    if shutil.which("scontrol") and " UP" in run("scontrol", "ping", cwd=Path.cwd()).stdout:
        return
    reason = "no Slurm controller answers"
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; .ci/run starts one")
    pytest.skip(f"{reason}; `tests/slurm/start_slurm.sh` starts one, as root")


@pytest.fixture(autouse=True)
def nothing_left_in_the_queue(tmp_path: Path) -> Iterator[None]:
    yield
    for number, _, directory in queue():
        if Path(directory).is_relative_to(tmp_path):
            subprocess.run(["scancel", number], check=False)
            wait_for(lambda job=number: all(job != other for other, _, _ in queue()), "scancel")


def queue() -> list[tuple[str, str, str]]:
    """Number, state and directory of each job that is not over."""
    lines = subprocess.check_output(["squeue", "--noheader", "--format=%A|%T|%Z"], text=True)
    return [tuple(line.split("|", 2)) for line in lines.splitlines()]  # type: ignore[misc]


def jobs_of(root: Path) -> list[tuple[str, str]]:
    return [(number, state) for number, state, where in queue() if Path(where) == root]


@pytest.fixture
def local_weights(project: Path, edit: Edit) -> Path:
    """A project whose weights are a small directory: fetch and preprocess take no time."""
    directory = make_checkpoint(project.parent / "checkpoint")
    write_tekken(directory / "tekken.json", 4096)
    edit(project, lambda values: values["model"].update(source=str(directory)))
    return project


def test_stages_run_as_jobs(local_weights: Path) -> None:
    answer = run(*SNAKEMAKE, "results/data.json", cwd=local_weights, env=without_slurm_job())
    assert answer.returncode == 0, answer.stdout
    assert json.loads((local_weights / "weights/source.json").read_text())["origin"] == "local"
    assert json.loads((local_weights / "results/data.json").read_text())["train"]["samples"] == 4
    logs = [path.parent.name for path in (local_weights / "logs/slurm").rglob("*.log")]
    assert sorted(logs) == ["rule_fetch", "rule_preprocess"]
    assert (local_weights / "logs/preprocess.log").exists()
    again = run(*SNAKEMAKE, "results/data.json", cwd=local_weights, env=without_slurm_job())
    assert "Nothing to be done" in again.stdout


def test_a_failing_stage_says_why_in_the_users_terminal(project: Path, edit: Edit) -> None:
    edit(project, lambda values: values["model"].update(source="./nowhere"))
    once = ("--retries", "0", "weights/source.json")
    answer = run(*SNAKEMAKE, *once, cwd=project, env=without_slurm_job())
    assert answer.returncode == 1
    words = (project / "logs/fetch.log").read_text()
    assert "nowhere" in words
    assert words.strip() in answer.stdout
    assert len(list((project / "logs/slurm/rule_fetch").rglob("*.log"))) == 1


def test_started_inside_a_job(local_weights: Path) -> None:
    """The plugin could hang here; rules/common.smk takes the outer job's variables away."""
    inside = ("srun", "--ntasks=1", "--cpus-per-task=1", "--mem=2000")
    answer = run(*inside, *SNAKEMAKE, "weights/source.json", cwd=local_weights, timeout=180)
    assert answer.returncode == 0, answer.stdout
    assert "You are running snakemake in a SLURM job context" not in answer.stdout
    assert (local_weights / "weights/source.json").exists()


def test_a_gpu_is_granted_to_the_stage_that_asks(toy: Path) -> None:
    (toy / "Snakefile").write_text(
        """
rule all:
    default_target: True
    input:
        "with.txt",
        "without.txt",


rule with_gpu:
    output:
        "with.txt",
    resources:
        gpu=1,
    shell:
        "echo ${{CUDA_VISIBLE_DEVICES:-none}} $SLURM_JOB_ID > {output}"


rule without_gpu:
    output:
        "without.txt",
    resources:
        gpu=0,
    shell:
        "echo ${{CUDA_VISIBLE_DEVICES:-none}} $SLURM_JOB_ID > {output}"
"""
    )
    answer = run(*SNAKEMAKE, cwd=toy, env=without_slurm_job())
    assert answer.returncode == 0, answer.stdout
    device, number = (toy / "with.txt").read_text().split()
    assert device in ("0", "1")
    asked = ("squeue", "--noheader", "--states=all", "--format=%j", "--jobs", number)
    name = subprocess.check_output(asked, text=True)
    assert name.startswith("ms4_"), "jobs must be findable by the profile's prefix"
    assert (toy / "without.txt").read_text().split()[0] == "none"


def start_and_kill(start: Start, root: Path, state: str) -> str:
    """Kill Snakemake while its job is in this state; returns the job's number."""
    log = root / "first.out"
    process = start(*SNAKEMAKE, cwd=root, env=without_slurm_job(), log=log)
    wait_for(lambda: [found for _, found in jobs_of(root)] == [state], f"a job that is {state}")
    if state == "RUNNING":
        wait_for(lambda: runs(root), "the stage")
    # The plugin must have reported the job, or Snakemake has not noted it as started.
    wait_for(lambda: "submitted with SLURM jobid" in log.read_text(), "the submission")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return jobs_of(root)[0][0]


def resume(start: Start, root: Path) -> tuple[subprocess.Popen[str], Path]:
    log = root / "resume.out"
    command = (sys.executable, "-m", "ms4", "resume", root, "--profile", "slurm")
    return start(*command, cwd=root.parent, env=without_slurm_job(), log=log), log


def quick_status_checks(root: Path) -> None:
    """For `ms4 resume`, which passes no options on: the same delay as above, in the profile."""
    with (root / "profiles/slurm/config.yaml").open("a") as profile:
        profile.write("slurm-init-seconds-before-status-checks: 1\n")


def test_resume_waits_for_the_job_that_lives_on(toy: Path, start: Start) -> None:
    quick_status_checks(toy)
    number = start_and_kill(start, toy, "RUNNING")
    process, log = resume(start, toy)
    wait_for(lambda: "waiting for" in log.read_text(), "resume to wait")
    assert f"Slurm job {number} (train, running)" in log.read_text()
    assert f"Slurm job {number})" in log.read_text(), "the lock's owner names its job"
    time.sleep(3)
    assert len(jobs_of(toy)) == 1, "a second job was submitted beside the first"
    (toy / "go").touch()

    assert process.wait(240) == 0, log.read_text()
    assert (toy / "results/train.json").exists()
    lines = [line.split()[0] for line in runs(toy)]
    assert lines == ["begin", "end"] * (len(lines) // 2), "two writers at once"
    assert jobs_of(toy) == []


def test_resume_waits_for_a_job_that_has_not_begun(toy: Path, start: Start) -> None:
    """It would begin later, beside a second one."""
    quick_status_checks(toy)
    fill = ("sbatch", "--parsable", "--exclusive", "--output=/dev/null", "--wrap", "sleep 600")
    blocker = subprocess.check_output(fill, text=True, cwd=toy.parent, env=without_slurm_job())
    number = start_and_kill(start, toy, "PENDING")
    process, log = resume(start, toy)
    wait_for(lambda: "waiting for" in log.read_text(), "resume to wait")
    assert f"Slurm job {number} (train, pending)" in log.read_text()
    (toy / "go").touch()
    subprocess.run(["scancel", blocker.strip()], check=True)
    assert process.wait(240) == 0, log.read_text()
    lines = [line.split()[0] for line in runs(toy)]
    assert lines == ["begin", "end"] * (len(lines) // 2), "two writers at once"


def test_resume_stops_if_the_queue_cannot_be_seen(toy: Path) -> None:
    """Without squeue's answer nobody knows what still runs: no guess, no second writer."""
    nowhere = toy / "slurm.conf"
    nowhere.write_text("ClusterName=gone\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\n")
    env = without_slurm_job() | {"SLURM_CONF": str(nowhere)}
    command = (sys.executable, "-m", "ms4", "resume", toy, "--profile")
    answer = run(*command, "slurm", cwd=toy, env=env)
    assert answer.returncode == 2
    assert "squeue does not answer (" in answer.stdout
    (toy / "go").touch()
    answer = run(*command, "local", cwd=toy, env=env)
    assert answer.returncode == 0, answer.stdout


@pytest.mark.parametrize("requeue", ["always", "never"])
def test_requeue_is_what_slurm_is_told(toy: Path, start: Start, requeue: str) -> None:
    """A job that Slurm begins again goes on; one that it does not may not be put back."""
    profile = toy / "profiles/slurm/config.yaml"
    values = {"data": {"train": ["-"]}, "where": {"run": "slurm", "requeue": requeue}}
    files = emit.project_files(Answers.model_validate(values | {"model": {"source": "tiny"}}))
    profile.write_text(files[str(profile.relative_to(toy))])
    log = toy / "out"
    process = start(*SNAKEMAKE, cwd=toy, env=without_slurm_job(), log=log)
    wait_for(lambda: runs(toy), "the stage")
    number = jobs_of(toy)[0][0]
    told = subprocess.check_output(["scontrol", "show", "job", number], text=True)
    assert f" Requeue={int(requeue == 'always')} " in told
    again = subprocess.run(["scontrol", "requeue", number], capture_output=True, check=False)
    assert (again.returncode == 0) == (requeue == "always"), again.stderr
    begun = 1 + (requeue == "always")
    if begun == 2:
        # Slurm lets two minutes pass before it begins such a job; a person can say otherwise.
        wait_for(lambda: [state for _, state in jobs_of(toy)] == ["PENDING"], "the queue")
        subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"], check=True)
    wait_for(lambda: [line.split()[0] for line in runs(toy)].count("begin") == begun, "it begins")
    assert [job for job, _ in jobs_of(toy)] == [number], "the same job"
    (toy / "go").touch()
    assert process.wait(300) == 0, log.read_text()
    assert runs(toy)[-1].startswith("end")
    assert (toy / "results/train.json").exists()
