"""What a Slurm profile says of a job whose node failed, and what cannot be asked of Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ms4 import config
from ms4.errors import Ms4Error
from ms4_wizard import project, writing
from ms4_wizard.answers import Answers
from tests.commands import snakemake

REQUEUES = [
    ("cluster", None, None),
    ("always", True, None),
    ("never", None, "slurm_extra='--no-requeue'"),
]


@pytest.mark.parametrize(("requeue", "setting", "extra"), REQUEUES)
def test_requeue_is_in_the_profile(
    place: Path, answers: Answers, requeue: str, setting: bool | None, extra: str | None
) -> None:
    where = answers.where.model_copy(update={"requeue": requeue})
    writing.write_from_answers(answers.model_copy(update={"where": where}), place / "project")
    file = place / "project/profiles/slurm/config.yaml"
    profile = yaml.safe_load(file.read_text())
    assert profile.get("slurm-requeue") is setting
    names = ["slurm_account='007'", "slurm_partition='input'"]
    assert profile["default-resources"] == [*names, *([extra] if extra else [])]
    assert project.read_project(place / "project").where.requeue == requeue
    answer = snakemake("--profile", "slurm", "-n", cwd=place / "project")
    assert answer.returncode == 0, answer.stdout
    assert ("slurm_extra=--no-requeue" in answer.stdout) == (extra is not None)


def test_requeue_entered_in_the_profile_comes_back(place: Path, answers: Answers) -> None:
    writing.write_from_answers(answers, place / "project")
    file = place / "project/profiles/slurm/config.yaml"
    before = file.read_text()
    file.write_text(before.replace("# slurm-requeue: true", "slurm-requeue: true"))
    assert project.read_project(place / "project").where.requeue == "always"
    file.write_text(before.replace("'007'", "'007'\n  - slurm_extra=--no-requeue"))
    assert project.read_project(place / "project").where.requeue == "never"
    file.write_text("- no settings\n")
    assert project.read_project(place / "project").where == answers.where


@pytest.mark.parametrize("name", ["gpus", "nodes"])
def test_more_than_one_is_refused_with_the_reason(place: Path, name: str) -> None:
    values = {"data": {"train": ["train.jsonl"]}, "where": {"run": "slurm", name: 2}}
    told = rf"where\.{name}: .*one GPU of one node in this version: leave it at 1 \(it is 2\)"
    with pytest.raises(Ms4Error, match=told):
        config.check(values, "answers", model=Answers)
    values["where"] = {"run": "slurm", name: 1}
    assert config.check(values, "answers", model=Answers).where.run == "slurm"
