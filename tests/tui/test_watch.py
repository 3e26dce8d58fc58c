"""What is read of a run: whole, half-written, damaged and missing files, and signals."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ms4 import config
from ms4.config import STAGES
from ms4.errors import Ms4Error
from ms4_wizard.watch import control
from ms4_wizard.watch.cli import main, profile_of
from ms4_wizard.watch.follow import Follower
from ms4_wizard.watch.metrics import MetricsFile
from ms4_wizard.watch.snakemake_log import parse
from ms4_wizard.watch.stages import OUTPUTS, Snapshot, Watcher
from ms4_wizard.widgets.plot import bars, braille, load_in_words, short
from tests.examples import examples
from tests.tui import runs

HOST = os.uname().nodename


def states(seen: Snapshot) -> dict[str, str]:
    return {stage.name: stage.state for stage in seen.stages}


def look(root: Path) -> Snapshot:
    return Watcher(root).look()


# States.


def test_nothing_is_there(tmp_path: Path) -> None:
    seen = look(runs.project(tmp_path))
    assert set(states(seen).values()) == {"waiting"}
    assert (seen.says, seen.current, seen.alive) == ("not started", None, False)
    assert (seen.steps, seen.planned_gib, seen.metrics.steps) == (None, None, [])


def test_in_the_middle_of_training(tmp_path: Path) -> None:
    started = runs.training(tmp_path)
    seen = Watcher(tmp_path).look(started + 75)
    assert list(states(seen).values()) == ["done"] * 5 + ["running"] + ["waiting"] * 2
    assert [stage.seconds for stage in seen.stages] == [125, 18, 11, 13, 2, 75, None, None]
    assert seen.current is not None
    assert seen.current.name == "train"
    assert (seen.steps, seen.planned_gib) == (400, 62.4)
    assert seen.says == "Snakemake is gone, its job runs on"
    assert seen.metrics.steps == list(range(1, 241))
    assert len(seen.metrics.expert_load) == 128


@pytest.mark.parametrize(
    ("log", "words", "state"),
    [
        ([runs.begun("train", 200)], "", "stopped"),
        ([runs.begun("train", 200), runs.failed("train", 230)], "", "failed"),
        (
            [runs.begun("train", 200), runs.failed("train", 230)],
            "ms4 train: stopped by SIGTERM after step 9; a checkpoint is saved\n",
            "stopped",
        ),
        (
            [
                *(runs.begun("train", 200), "Will exit after finishing currently running jobs.\n"),
                runs.failed("train", 230),
            ],
            "",
            "stopped",
        ),
        (
            [
                *(runs.begun("train", 200), runs.failed("train", 230)),
                *("Trying to restart job 6.\n", runs.begun("train", 231)),
                runs.finished("train", 240),
            ],
            "",
            "done",
        ),
    ],
)
def test_how_training_ended(tmp_path: Path, log: list[str], words: str, state: str) -> None:
    runs.project(tmp_path)
    runs.done(tmp_path, *STAGES[:5], *(["train"] if state == "done" else []))
    runs.put_log(tmp_path, runs.log(*runs.until("train"), *log, host=HOST))
    runs.put(tmp_path, "logs/train.log", words)
    seen = look(tmp_path)
    assert states(seen)["train"] == state
    assert not seen.alive
    wanted = {"stopped": "stopped", "failed": "failed in train", "done": "stopped"}
    assert seen.says == wanted[state]


def test_on_another_host_in_slurms_queue(tmp_path: Path) -> None:
    runs.project(tmp_path)
    runs.done(tmp_path, *STAGES[:5])
    runs.put_log(tmp_path, runs.log(*runs.until("train"), runs.begun("train", 200, "4711")))
    seen = look(tmp_path)
    train = seen.stages[5]
    assert (train.state, train.slurm_job) == ("queued", "4711")
    assert seen.says == "running on node"
    with pytest.raises(Ms4Error, match=r"Snakemake runs on node: stop it there"):
        control.Stopper(tmp_path).stop(seen)


def test_what_is_to_be_done_again_waits(tmp_path: Path) -> None:
    runs.project(tmp_path)
    runs.done(tmp_path, *STAGES)
    runs.put_log(tmp_path, runs.log(*runs.until("deliver"), host=HOST), "2026-11-25T01")
    again = ("evaluate", "deliver")
    later = runs.log(runs.begun("evaluate", 9000), planned=again)
    runs.put_log(tmp_path, later, "2026-11-25T02")
    runs.put_log(tmp_path, "Unlocked working directory.\n", "2026-11-25T03")
    seen = look(tmp_path)
    assert list(states(seen).values()) == ["done"] * 6 + ["queued", "waiting"]
    assert seen.stages[5].seconds == runs.SECONDS["train"]


def test_all_is_done(tmp_path: Path) -> None:
    runs.project(tmp_path)
    runs.done(tmp_path, *STAGES)
    parts = [*runs.until("deliver"), runs.begun("deliver", 4000), runs.finished("deliver", 4003)]
    end = "Complete log(s): /x\n"
    runs.put_log(tmp_path, runs.log(*parts, end))
    seen = look(tmp_path)
    assert seen.finished
    assert (seen.says, seen.elsewhere) == ("finished", None)
    # What somebody removes is to be done again.
    (tmp_path / OUTPUTS["evaluate"]).unlink()
    assert states(look(tmp_path))["evaluate"] == "waiting"


def test_what_another_configuration_made_is_to_be_done_again(tmp_path: Path) -> None:
    runs.project(tmp_path)

    def configure(**more: object) -> config.RunConfig:
        path = runs.put(
            tmp_path, "config/config.yaml", json.dumps({"data": {"train": ["a"]}, **more})
        )
        return config.load(path)

    made = configure()
    for stage in STAGES:
        manifest = {"stage": stage, "config_hash": made.part_hash(stage), "steps": 400}
        runs.put(tmp_path, str(OUTPUTS[stage]), json.dumps(manifest))
    runs.put(tmp_path, "results/metrics.jsonl", runs.metrics(400))
    watcher = Watcher(tmp_path)
    assert watcher.look().says == "finished"
    configure(evaluate={"max_new_tokens": 7})
    seen = watcher.look()
    assert list(states(seen).values()) == ["done"] * 6 + ["waiting"] * 2
    assert (seen.says, len(seen.metrics.steps)) == ("stopped", 400)
    # All later ones are made of what is outdated, though their own settings are as they were.
    configure(data={"train": ["b"]})
    seen = watcher.look()
    assert list(states(seen).values()) == ["done"] * 3 + ["waiting"] * 5
    assert (seen.metrics.steps, seen.steps) == ([], 400)
    runs.this_process_runs(tmp_path, "train")
    assert len(watcher.look().metrics.steps) == 400
    runs.put(tmp_path, "config/config.yaml", "data: [")
    assert watcher.look().stages[-1].state == "done", "nobody can tell"


# Files that are half there.


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run in its middle, by name."""
    root = tmp_path_factory.mktemp("middle")
    runs.training(root)
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name not in ("Snakefile", "config.yaml")
    }


@settings(
    max_examples=examples(60),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_files_cut_anywhere(
    tmp_path_factory: pytest.TempPathFactory, middle: dict[str, bytes], data: st.DataObject
) -> None:
    """Nothing is raised, and nothing is said that the whole files do not say."""
    root = runs.project(tmp_path_factory.mktemp("cut"))
    watcher = Watcher(root)
    watcher.look()
    for _ in range(2):
        for name, content in middle.items():
            end = data.draw(st.integers(0, len(content)), name)
            junk = data.draw(st.sampled_from([b"", b"\xff\x00", b"{", b"[1]\n", b"3\n"]))
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content[:end] + junk)
        seen = watcher.look()
        assert seen.metrics.steps == sorted(set(seen.metrics.steps))
        assert set(seen.metrics.steps) <= set(range(1, 241))
        assert all(len(c) == len(seen.metrics.steps) for c in seen.metrics.curves.values())
        assert seen.stages[6].state == seen.stages[7].state == "waiting"


def test_half_a_line_waits_for_its_rest(tmp_path: Path) -> None:
    path = tmp_path / "results/metrics.jsonl"
    file = MetricsFile(tmp_path)
    assert file.read().steps == []
    text = runs.metrics(3)
    cut = text.index('"loss"', text.index("\n"))
    runs.put(tmp_path, "results/metrics.jsonl", text[:cut])
    assert file.read().steps == [1]
    with path.open("a") as more:
        more.write(text[cut:] + "not JSON\n" + '{"step": true}\n{"step": "4"}\n{"step": 4}\n')
    found = file.read()
    assert found.steps == [1, 2, 3, 4]
    assert math.isnan(found.curves["loss"][-1])
    assert found.last("loss") is None
    # A training that goes on from a checkpoint writes the file anew, shorter.
    path.unlink()
    runs.put(tmp_path, "results/metrics.jsonl", runs.metrics(2))
    assert file.read().steps == [1, 2]
    # A step that is done again counts once.
    with path.open("a") as more:
        more.write(runs.metrics(3).splitlines()[1] + "\n")
    assert file.read().steps == [1, 2]
    path.unlink()
    assert file.read().steps == []


def test_a_follower_shows_the_end_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"line {n}\n" for n in range(10_000)))
    follower = Follower(path, most=100)
    lines, anew = follower.read()
    assert lines[-1] == "line 9999"
    assert all(line.startswith("line ") for line in lines)
    assert len(lines) == 9
    assert not anew
    assert follower.read() == ([], False)
    path.write_text("short\n")
    assert follower.read() == (["short"], True)


def test_a_log_of_something_else() -> None:
    assert parse(Path("x"), "Unlocked working directory.") is None
    session = parse(
        Path("x"), runs.log("[Xxx Nov 99 00:00:00 2026]\nFinished jobid: 1 (Rule: z)\n")
    )
    assert session is not None
    assert session.jobs["z"].ended is None


# Starting and stopping; the real pipeline is in test_run_screen.py.


def test_what_is_no_project(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert f"ms4-wizard watch: {tmp_path}: not a project, it has no Snakefile." in (
        capsys.readouterr().err
    )
    with pytest.raises(Ms4Error, match="not a project"):
        control.start(tmp_path, "local")
    runs.project(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "there is no terminal to show it on" in capsys.readouterr().err
    (tmp_path / "logs").write_text("a file\n")
    with pytest.raises(Ms4Error, match=r"logs/snakemake\.log: cannot be written"):
        control.start(tmp_path, "local")


@pytest.mark.parametrize(
    ("note", "profile"),
    [('{"where": {"run": "slurm"}, "ms4_version": "0", "files": {}}', "slurm"), ("{", "local")],
)
def test_profile_is_the_projects_own(tmp_path: Path, note: str, profile: str) -> None:
    runs.put(runs.project(tmp_path), "config/project.json", note)
    assert profile_of(tmp_path) == profile


# Pictures.


def test_braille_has_its_size_and_its_ends() -> None:
    for width, height in ((1, 1), (10, 1), (33, 4)):
        for values in ([], [math.nan], [1.0], [1.0, 2.0], [1.0] * 500, list(range(1000))):
            lines = braille([float(v) for v in values], width, height)
            assert [len(line) for line in lines] == [width] * height
            assert all(0x2800 <= ord(c) <= 0x28FF for line in lines for c in line)
    rising = braille([float(v) for v in range(40)], 10, 2)
    assert rising[0][-1] != "⠀"
    assert rising[1][0] != "⠀"
    assert rising[0][0] == rising[1][-1] == "⠀"
    gap = braille([1.0, 1.0, math.nan, math.nan, math.nan, 1.0, 1.0], 7, 1)[0]
    assert gap[3] == "⠀"
    assert gap[0] != "⠀"


def test_bars_and_numbers() -> None:
    assert bars([1, 2, 4], 10, 1) == ["▂▄█"]
    assert bars([1, 2, 3, 4], 2, 1) == ["▄█"]
    assert bars([0.0, 0.0], 4, 2) == ["  ", "  "]
    assert bars([], 4, 1) == [""]
    assert [short(v) for v in (0.0, 1e-4, 3.14159, 12345.6, math.nan)] == [
        *("0", "1.0e-4", "3.14", "12,346", "–")
    ]
    assert str(load_in_words([0.5, 0.25, 0.25, 0])) == "experts 0 to 2 × an even share, 1 idle"


def test_what_was_read_is_not_read_again(tmp_path: Path) -> None:
    runs.training(tmp_path)
    watcher = Watcher(tmp_path)
    first = watcher.look()
    path = tmp_path / "results/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    with path.open("a") as more:
        more.write(json.dumps({**json.loads(lines[-1]), "step": 241}) + "\n")
    path.write_bytes(b"x" * len("".join(lines)) + path.read_bytes()[len("".join(lines)) :])
    assert watcher.look().metrics.steps == [*range(1, 242)]
    assert first.metrics.steps[-1] == 240  # what a screen shows does not change under it
