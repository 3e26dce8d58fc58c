"""`--json`, exit codes, and what partial answers are missing, as a script sees them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tui.test_headless import LEAST, wizard

pytestmark = pytest.mark.slow


def report(place: Path, *arguments: str, typed: str = LEAST) -> tuple[int, dict[str, Any]]:
    code, out, err = wizard(place, "--answers", "-", "--json", *arguments, typed=typed)
    assert (code == 0) == (err == "")
    return code, json.loads(out)


def test_what_was_written(place: Path) -> None:
    code, tree = report(place, "p", "--set", "train.steps=100")
    assert (code, tree["exit_code"], tree["ok"], tree["written"]) == (0, 0, True, True)
    assert "config/config.yaml" in tree["files"]
    assert tree["next"] == ["cd ./p", "snakemake --profile local"]
    plan = tree["plan"]
    assert sum(plan["components"].values()) == plan["peak_bytes"]
    assert plan["fits"] is True
    assert (tree["speed"]["kind"], tree["speed"]["steps"]) == ("estimate", 100)
    assert tree["answers"]["data"]["train"] == ["train.jsonl"]
    assert all((place / "p" / name).is_file() for name in tree["files"])


def test_dry_run_writes_nothing(place: Path) -> None:
    code, tree = report(place, "--dry-run", "p")
    assert code == 0
    assert tree["written"] is False
    assert "config/config.yaml" in tree["files"]
    assert not (place / "p").exists()


def test_files_are_named_alike_before_and_after(place: Path) -> None:
    """A dry run announces what writing then does: in a new project, in one that changes, in one
    where a file was edited, and in one where nothing is left to do."""
    new = report(place, "--dry-run", "p")[1]["files"]
    assert new == report(place, "p")[1]["files"]
    assert set(new.values()) == {"written"}
    assert set(new) == set(json.loads((place / "p/config/project.json").read_text())["files"])
    assert report(place, "p")[1]["files"] == {}
    rules = place / "p/rules/train.smk"
    rules.write_text(rules.read_text() + "# mine\n")
    change = ("--set", "train.steps=7")
    told = report(place, "--dry-run", "p", *change)[1]["files"]
    assert told == {
        **{"README.md": "written", "config/config.yaml": "written"},
        "rules/train.smk": "kept",
    }
    assert report(place, "p", *change)[1]["files"] == told


def test_partial_answers_name_what_is_missing(place: Path) -> None:
    code, tree = report(place, "p", typed="adapters: {rank: many}\nsed: 1")
    assert (code, tree["ok"], tree["exit_code"], tree["kind"]) == (2, False, 2, "answers")
    assert tree["missing"] == ["data.train"]
    assert {fault["field"] for fault in tree["faults"]} == {"adapters.rank", "sed"}
    assert "data.train: is missing; add it" in tree["error"]
    assert not (place / "p").exists()


@pytest.mark.parametrize(
    ("arguments", "typed", "kind"),
    [
        (["sets"], LEAST, "other"),
        (["p", "--set", "run.memory_gib=0.1"], LEAST, "other"),
        (["p"], "a: [", "other"),
        (["p"], "data: {train: [nowhere]}", "other"),
        (["p"], "method: full\ndata: {train: [train.jsonl]}", "answers"),
    ],
)
def test_refusals(place: Path, arguments: list[str], typed: str, kind: str) -> None:
    code, tree = report(place, *arguments, typed=typed)
    assert (code, tree["ok"], tree["kind"], tree["missing"]) == (2, False, kind, [])
    assert tree["error"]


def test_edits_are_a_kind_of_their_own(place: Path) -> None:
    assert report(place, "p")[0] == 0
    file = place / "p/config/config.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: 3"))
    code, tree = report(place, "p", "--set", "seed=1")
    assert (code, tree["kind"]) == (2, "edited")


def test_exit_codes_are_documented(place: Path) -> None:
    code, out, _ = wizard(place, "--help")
    assert code == 0
    for number in ("0 ", "1 ", "2 ", "130 "):
        assert f"\n  {number}" in out
