"""The command without screens, as a script or a user calls it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from ms4 import config
from ms4_wizard import cli
from tests.commands import CHECKOUT, run

LEAST = "{model: {source: tiny}, data: {train: [train.jsonl]}, run: {device: cpu}}"


def wizard(place: Path, *arguments: str | Path, typed: str | None = None) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "ms4_wizard", *map(str, arguments)],
        cwd=place,
        input=typed if typed is not None else "",
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def test_answers_from_a_file_and_from_standard_input(place: Path) -> None:
    (place / "answers.yaml").write_text(LEAST)
    code, out, err = wizard(place, "--answers", "answers.yaml", "one")
    assert (code, err) == (0, "")
    assert "Device: CPU (run.device says so)" in out
    assert "to spare" in out
    assert out.splitlines()[-2:] == ["  cd ./one", "  snakemake --profile local"]
    code, out, _ = wizard(place, "--answers", "-", "two", typed=LEAST)
    assert code == 0
    assert (place / "one/config/config.yaml").read_text() == (
        place / "two/config/config.yaml"
    ).read_text()


def test_settings_override(place: Path) -> None:
    code, _, err = wizard(
        place,
        *("--answers", "-", "p", "--set", "adapters.rank=4", "--set", "adapters.targets=experts"),
        *("--set", "where.run=slurm", "--set", "seed=1", "--set", "seed=2"),
        typed=LEAST,
    )
    assert (code, err) == (0, "")
    loaded = config.load(place / "p/config/config.yaml")
    assert (loaded.adapters.rank, loaded.adapters.targets, loaded.seed) == (4, ("experts",), 2)


def test_dry_run_writes_nothing(place: Path) -> None:
    code, out, _ = wizard(place, "--answers", "-", "--dry-run", "p", typed=LEAST)
    assert code == 0
    assert "| peak (" in out
    assert "  config/config.yaml\n" in out
    assert "  slurm -> profiles/slurm\n" in out
    assert not (place / "p").exists()


def test_default_directory(place: Path) -> None:
    assert wizard(place, "--answers", "-", typed=LEAST)[0] == 0
    assert (place / "ms4-project/Snakefile").is_file()


def test_schema_says_what_an_answers_file_may_hold(place: Path) -> None:
    code, out, _ = wizard(place, "--print-schema")
    assert code == 0
    schema = json.loads(out)
    for name in ("answers", "qlora-text"):
        values = yaml.safe_load((CHECKOUT / f"examples/{name}.yaml").read_text())
        jsonschema.validate(values, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"data": {"train": ["a"]}, "sed": 1}, schema)
    assert schema["$defs"]["Where"]["properties"]["partition"]["description"]


@pytest.mark.parametrize(
    ("arguments", "typed", "message"),
    [
        (
            ["p"],
            "",
            "no terminal for the screens. Give the answers in a file: ms4-wizard --answers",
        ),
        (["--answers", "nowhere.yaml", "p"], "", "nowhere.yaml: no such answers file"),
        (["--answers", "sets", "p"], "", "sets: cannot be read"),
        (["--answers", "-", "p"], "a: [", "standard input: not valid YAML: line 1"),
        (["--answers", "-", "p"], "", "standard input: holds no configuration"),
        (["--answers", "-", "p"], "seed: 1\nseed: 2", "line 2: the key 'seed' is given twice"),
        (["--answers", "-", "p"], "seed: x\nsed: 1", "standard input:1: seed: Input should be"),
        (["--answers", "-", "p"], "seed: x\nsed: 1", "standard input:2: sed: unknown key; did you"),
        (["--answers", "-", "p"], "seed: x\nsed: 1", "standard input: data.train: is missing"),
        (["--answers", "-", "p"], "where: {run: moon}\ndata: {train: [a]}", "where.run: Input"),
        (
            ["--answers", "-", "p"],
            "data: {train: [a, b]}",
            "data.train: no such file: a; no such file: b",
        ),
        (["--answers", "-", "x" * 300], LEAST, "cannot be used (File name too long)"),
        (["--answers", "-", "p", "--set", "run.memory_gib=1e300"], LEAST, "less than or equal"),
        (["--answers", "-", "p", "--set", "seed=-1"], LEAST, "--set seed: Input should be greater"),
        (["--answers", "-", "p"], 'seed: !!int "abc"', "standard input: not valid YAML"),
        (["--answers", "-", "p"], "seed: !!bool x", "standard input: not valid YAML"),
        (["--answers", "-", "p"], "seed: !!timestamp x", "standard input: not valid YAML"),
        (["--answers", "-", "p"], "data: {train: [2026-02-30]}", "standard input: not valid YAML"),
        (["--answers", "-", "p"], "seed: " + "9" * 5000, "standard input: not valid YAML"),
        (["--answers", "-", "p"], "seed: 0x" + "f" * 5000, "seed: Input should be"),
        (["--answers", "-", "p"], "adapters: {targets: !!set {shared}}", "a set has no order"),
        (["--answers", "-", "p", "--set", "data.train=\udcff"], LEAST, "its name is not UTF-8"),
        (["--answers", "-", "p"], "seed: 0b_", "standard input: not valid YAML"),
        (["--answers", "-", "p"], "[" * 5000, "standard input: not valid YAML"),
        (["--answers", "-", "p"], "a: &a [1]\nb: *a", "line 2: aliases are not read"),
        (["--answers", "-", "p"], "data: !!python/object/apply:os.system [id]", "not valid YAML"),
        (["--answers", "-", "p"], 'data: {train: ["a\\e]0;x"]}', "no such file: a\\x1b]0;x"),
        (["--answers", "-", "p"], "data: 3", "standard input:1: data: Input should be"),
        (["--answers", "-", "p", "--set", "data.train=x"], "data: 3", "`data` is not a section"),
        (["--answers", "-", "p", "--set", "sed=1"], LEAST, "unknown key `sed`"),
        (["--answers", "-", "sets"], LEAST, "sets: holds something that is not an ms4 project"),
        (
            ["--answers", "-", "p"],
            f"method: full\n{'data: {train: [train.jsonl]}'}",
            "method: `full`",
        ),
        (["--dry-run", "p"], "", "--dry-run: only with --answers FILE"),
        (
            ["--answers", "-", "p", "--set", "run.memory_gib=0.1"],
            LEAST,
            "the run does not fit: it needs",
        ),
        (
            ["--answers", "-", "p", "--set", "model.source=./sets"],
            LEAST,
            "sets/config.json: cannot be read",
        ),
    ],
)
def test_faults(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    typed: str,
    message: str,
) -> None:
    """In this process, which a traceback would go through: a new one takes 0.4 s for each."""
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    code = cli.main(arguments)
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.startswith("ms4-wizard: ")
    assert message in err
    assert not (place / "p").exists()


def test_what_does_not_fit_says_how_to_plan_for_another_machine(place: Path) -> None:
    typed = "{data: {train: [train.jsonl]}, run: {device: cpu}, train: {micro_batch: 4096}}"
    code, out, err = wizard(place, "--answers", "-", "p", typed=typed)
    assert code == 2
    assert "short" in out
    assert "run.device: cuda and run.memory_gib: 80" in err


def test_edited_file_needs_overwrite_where_the_same_line_is_new(place: Path) -> None:
    assert wizard(place, "--answers", "-", "p", typed=LEAST)[0] == 0
    file = place / "p/config/config.yaml"
    file.write_text(file.read_text() + "# mine\n")
    arguments = ["--answers", "-", "p", "--set", "seed=1"]
    code, out, _ = wizard(place, *arguments, typed=LEAST)
    assert code == 0
    assert "merged, what you edited stays: config/config.yaml" in out
    assert "\nseed: 1\n" in file.read_text()
    assert file.read_text().endswith("# mine\n")
    file.write_text(file.read_text().replace("\nseed: 1\n", "\nseed: 1  # too\n"))
    arguments[-1] = "seed=2"
    code, _, err = wizard(place, *arguments, typed=LEAST)
    assert code == 2
    assert "config/config.yaml. With --overwrite" in err
    code, out, _ = wizard(place, *arguments, "--overwrite", typed=LEAST)
    assert code == 0
    assert "replaced, and what you edited kept beside it as a .bak: config/config.yaml" in out
    assert (place / "p/config/config.yaml.bak").read_text().endswith("# mine\n")


def test_the_command_is_installed() -> None:
    answer = run(Path(sys.executable).parent / "ms4-wizard", "--version", cwd=CHECKOUT)
    assert answer.stdout.startswith("ms4 ")
