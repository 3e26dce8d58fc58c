"""The project that is written: its bytes, its paths, and what happens to what was there."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

import ms4
from ms4 import config
from ms4.errors import Ms4Error
from ms4_wizard import answers_file, emit, project, writing
from ms4_wizard.answers import Answers
from tests.commands import CHECKOUT, run, snakemake
from tests.tui.conftest import contents

DRY_RUNS = [["-n"], ["--lint"], ["--profile", "local", "-n"], ["--profile", "slurm", "-n"]]


def write(answers: Answers, directory: Path, *, overwrite: bool = False) -> list[str]:
    return writing.write_from_answers(answers, directory, overwrite=overwrite)


# What is written.


def test_files_of_a_project(place: Path, answers: Answers) -> None:
    write(answers, place / "project")
    root = place / "project"
    assert set(contents(root)) == {
        *("Snakefile", "README.md", ".gitignore", "local", "slurm"),
        *("config/config.yaml", "config/schema.json", "config/project.json"),
        *(f"profiles/{name}/config.yaml" for name in ("default", "local", "slurm")),
        *(f"rules/{name}.smk" for name in ("common", "data", "deliver", "evaluate", "train")),
        "rules/weights.smk",
    }
    for name in ("Snakefile", "rules/common.smk", "profiles/local/config.yaml"):
        assert (root / name).read_bytes() == (CHECKOUT / name).read_bytes()
    assert (root / "local").readlink() == Path("profiles/local")
    loaded = config.load(root / "config/config.yaml")
    assert loaded.data.train == ("../train.jsonl",)
    assert loaded.data.test == {"held": "../sets/test.jsonl"}
    schema = json.loads((root / "config/schema.json").read_text())
    jsonschema.validate(yaml.safe_load((root / "config/config.yaml").read_text()), schema)


def test_each_value_has_its_comment(place: Path, answers: Answers) -> None:
    write(answers, place / "project")
    lines = (place / "project/config/config.yaml").read_text().splitlines()
    keys = [n for n, line in enumerate(lines) if re.match(r" {0,2}[a-z_]+:", line)]
    assert len(keys) > 35
    # `held:` is the name of a set, two levels down
    uncommented = [lines[n] for n in keys if not lines[n - 1].lstrip().startswith("# ")]
    assert uncommented == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["answers", "qlora-text"])
def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(CHECKOUT)
    read = answers_file.read_answers(f"examples/{name}.yaml", [])
    told = write(read, tmp_path / "project")
    assert told[-1] == "  snakemake --profile local"
    for options in DRY_RUNS:
        answer = snakemake(*options, cwd=tmp_path / "project")
        assert answer.returncode == 0, answer.stdout


def test_the_checkouts_configuration_is_the_demos() -> None:
    """`make generated` writes it."""
    answer = run(
        *(sys.executable, "-m", "ms4_wizard", "--answers", "examples/answers.yaml"),
        "--print-config",
        cwd=CHECKOUT,
    )
    assert (CHECKOUT / "config/config.yaml").read_text() == answer.stdout


def test_same_answers_same_bytes(place: Path, answers: Answers) -> None:
    write(answers, place / "one")
    write(answers, place / "two")
    assert contents(place / "one") == contents(place / "two")
    # and over a project of other answers
    write(
        answers.model_copy(update={"seed": 5, "where": Answers.model_fields["where"].default}),
        place / "three",
    )
    assert contents(place / "one") != contents(place / "three")
    write(answers, place / "three")
    assert contents(place / "one") == contents(place / "three")


@pytest.mark.slow
def test_slurm_names_are_names(place: Path, answers: Answers) -> None:
    """`input` is a function of Snakemake's and 007 no number: they reach the plugin as they are."""
    write(answers, place / "project")
    profile = yaml.safe_load((place / "project/profiles/slurm/config.yaml").read_text())
    assert profile["default-resources"] == ["slurm_account='007'", "slurm_partition='input'"]
    assert profile["set-resources"] == ["train:runtime=720"]
    answer = snakemake("--profile", "slurm", "-n", cwd=place / "project")
    assert answer.returncode == 0, answer.stdout
    assert "slurm_account=007, slurm_partition=input" in answer.stdout
    assert re.search(r"rule train:.*?runtime=720,", answer.stdout, re.DOTALL)


def test_readme_has_the_projects_commands(place: Path, answers: Answers) -> None:
    write(answers, place / "project")
    text = (place / "project/README.md").read_text()
    assert "snakemake --profile slurm -n " in text
    assert "ms4 resume . --profile slurm" in text
    assert "| adapters | rank: attention 8, shared 8; alpha 64; " in text
    assert "Here: " in (place / "project/config/config.yaml").read_text()


@pytest.mark.slow
def test_directories_where_links_cannot_be_made(
    place: Path, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")  # what vfat says

    # No file system without links can be mounted by a test that is not root.
    monkeypatch.setattr(os, "symlink", refuse)
    write(answers, place / "project")
    assert not (place / "project/slurm").is_symlink()
    answer = snakemake("--profile", "slurm", "-n", cwd=place / "project")
    assert answer.returncode == 0, answer.stdout
    # The copy follows what it is a copy of.
    changed = answers.where.model_copy(update={"partition": "other"})
    write(answers.model_copy(update={"where": changed}), place / "project")
    copy = place / "project/slurm/config.yaml"
    assert "'other'" in copy.read_text()
    # And what is edited in it is not lost.
    copy.write_text(copy.read_text() + "# mine\n")
    with pytest.raises(Ms4Error, match=r"replaced: slurm/config\.yaml"):
        write(answers, place / "project")
    write(answers, place / "project", overwrite=True)
    assert copy.with_name("config.yaml.bak").read_text().endswith("# mine\n")


# Paths.


def test_paths(place: Path) -> None:
    home = Path.home()
    read = Answers.model_validate(
        {
            "model": {"source": "./here"},
            "data": {"train": ["a", "/abs//b", "~/c", "~d"], "test": {"x": "../e"}},
        }
    )
    moved = emit.relocate(read, place, place / "deep/project")
    assert moved.data.train == ("../../a", "/abs/b", str(home / "c"), "../../~d")
    assert moved.data.test == {"x": "../../../e"}
    assert moved.model.source == "../../here"
    back = emit.relocate(moved, place / "deep/project", place)
    assert back.data.train == ("a", "/abs/b", str(home / "c"), "./~d")
    assert back.model.source == "./here"


def test_patterns_and_data_sets_of_the_hub(place: Path) -> None:
    hub = "hub:owner/name@v1"
    data = {"train": ["more/*.jsonl", hub], "weights": {"more/*.jsonl": 2.0, hub: 0.5}}
    read = Answers.model_validate({"data": {**data, "images": {"roots": ["photos"]}}})
    moved = emit.relocate(read, place, place / "p").data
    assert moved.train == ("../more/*.jsonl", hub)
    assert moved.weights == {"../more/*.jsonl": 2.0, hub: 0.5}
    assert moved.images.roots == ("../photos",)
    assert emit.missing_data(read, place) == {"data.train": "no such file: more/*.jsonl"}
    (place / "more").mkdir()
    (place / "more/a.jsonl").write_text("{}")
    assert emit.missing_data(read, place) == {}
    unpinned = Answers.model_validate({"data": {"train": ["hub:owner/name"]}})
    assert "with a revision" in emit.missing_data(unpinned, place)["data.train"]


@pytest.mark.parametrize("source", ["tiny", "owner/name"])
def test_what_is_no_path_stays(place: Path, source: str) -> None:
    read = Answers.model_validate({"model": {"source": source}, "data": {"train": ["a"]}})
    assert emit.relocate(read, place, place / "p").model.source == source


# What was there.


@pytest.mark.slow
def test_written_into_the_current_directory(place: Path, answers: Answers) -> None:
    data = answers.data.model_copy(update={"train": (str(place / "train.jsonl"),), "test": {}})
    (place / "empty").mkdir()
    os.chdir(place / "empty")
    write(answers.model_copy(update={"data": data}), Path())
    assert snakemake("-n", cwd=place / "empty").returncode == 0
    assert [path.name for path in place.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("what", ["file", "directory", "link", "checkout"])
def test_something_else_is_refused(place: Path, answers: Answers, what: str) -> None:
    target = place / "other"
    if what == "file":
        target.write_text("mine")
    elif what == "link":
        target.symlink_to("nowhere")
    elif what == "directory":
        target.mkdir()
        (target / "mine").write_text("mine")
    else:
        target.mkdir()
        (target / "Snakefile").write_text("")
        (target / "config").mkdir()
        (target / "config/config.yaml").write_text("")
    before = contents(place)
    with pytest.raises(Ms4Error, match=r"holds something that is not|is a link that leads nowhere"):
        write(answers, target)
    assert contents(place) == before


def test_edits_are_not_lost(place: Path, answers: Answers) -> None:
    root = place / "project"
    write(answers, root)
    train, profile = root / "rules/train.smk", root / "profiles/slurm/config.yaml"
    train.write_text(train.read_text() + "# mine\n")
    profile.write_text(profile.read_text() + "# mine too\n")
    # ms4 has nothing new to say of train.smk: it is kept.
    told = write(answers.model_copy(update={"seed": 3}), root)
    assert "kept as you edited it: rules/train.smk" in told
    assert "written: config/config.yaml" in told
    assert train.read_text().endswith("# mine\n")
    # Of the profile it has, in other lines: both stand there.
    other = answers.model_copy(
        update={"where": answers.where.model_copy(update={"hours": 3}), "seed": 4}
    )
    told = write(other, root)
    assert "merged, what you edited stays: profiles/slurm/config.yaml" in told
    text = profile.read_text()
    assert "train:runtime=180" in text
    assert text.endswith("# mine too\n")
    # In the same lines: that is refused, before anything is written.
    profile.write_text(text.replace("train:runtime=180", "train:runtime=200"))
    before = contents(root)
    with pytest.raises(Ms4Error, match=r"edited .*: profiles/slurm/config\.yaml\. .*--overwrite"):
        write(answers, root)
    assert contents(root) == before
    write(answers, root, overwrite=True)
    assert "train:runtime=200" in (root / "profiles/slurm/config.yaml.bak").read_text()
    profile.write_bytes(b"# mine again \xff\n")
    write(other, root, overwrite=True)
    assert "train:runtime=200" in (root / "profiles/slurm/config.yaml.bak").read_text()
    assert (root / "profiles/slurm/config.yaml.bak2").read_bytes() == b"# mine again \xff\n"
    write(answers, root)
    assert "train:runtime=720" in profile.read_text()
    assert train.read_text().endswith("# mine\n")


def test_comments_of_the_configuration_stay_when_answers_change(
    place: Path, answers: Answers
) -> None:
    root = place / "project"
    write(answers, root)
    file = root / "config/config.yaml"
    mine = file.read_text().replace("\nseed: 0\n", "\nseed: 0\n")
    mine = mine.replace("\nadapters:\n", "\n# mine: tried 1 and 2, too\nadapters:\n")
    file.write_text(mine + "# the end\n")
    adapters = answers.adapters.model_copy(update={"rank": 4})
    told = write(answers.model_copy(update={"adapters": adapters}), root)
    assert "merged, what you edited stays: config/config.yaml" in told
    text = file.read_text()
    assert "# mine: tried 1 and 2, too\n" in text
    assert text.endswith("# the end\n")
    assert config.load(file).adapters.rank == 4
    # A value that was edited and that new answers have, too, is no conflict; another one is.
    file.write_text(text.replace("\nseed: 0\n", "\nseed: 9\n"))
    with pytest.raises(project.EditedError):
        write(answers, root)
    told = write(answers.model_copy(update={"seed": 9}), root)
    assert "merged, what you edited stays: config/config.yaml" in told
    assert (config.load(file).seed, config.load(file).adapters.rank) == (9, 8)
    assert "# mine: tried 1 and 2, too\n" in file.read_text()


def test_a_write_that_fails_leaves_nothing(
    place: Path, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    monkeypatch.setattr(project, "write_text", full)
    before = contents(place)
    with pytest.raises(Ms4Error, match="No space left on device"):
        write(answers, place / "project")
    assert contents(place) == before
    assert sorted(path.name for path in place.iterdir()) == ["sets", "train.jsonl"]


def test_a_directory_that_cannot_be_made(place: Path, answers: Answers) -> None:
    with pytest.raises(Ms4Error, match=r"project: cannot be used \("):
        write(answers, place / "train.jsonl/project")


def test_answer_given_again_after_an_edit_is_written(place: Path, answers: Answers) -> None:
    """The edit of a value is not "kept": the answers say otherwise. That of a comment is."""
    root = place / "project"
    write(answers, root)
    file = root / "config/config.yaml"
    written = file.read_text()
    file.write_text(written.replace("rank: 8", "rank: 16"))
    with pytest.raises(project.EditedError):
        write(answers, root)
    assert any("config/config.yaml" in line for line in write(answers, root, overwrite=True))
    assert file.read_text() == written
    file.write_text(f"# mine\n{written}")
    assert "kept as you edited it: config/config.yaml" in write(answers, root)
    assert file.read_text() == f"# mine\n{written}"


def test_dry_run_over_a_project_says_what_would_be_done(place: Path, answers: Answers) -> None:
    root = place / "project"
    write(answers, root)
    other = answers.model_copy(update={"seed": 3})
    before = contents(root)
    told = writing.write_from_answers(other, root, dry_run=True)
    assert told[1:] == ["  written: config/config.yaml"]
    assert contents(root) == before
    file = root / "config/config.yaml"
    file.write_text(file.read_text().replace("rank: 8", "rank: 16"))
    with pytest.raises(project.EditedError):
        writing.write_from_answers(other, root, dry_run=True)


@pytest.mark.slow
@pytest.mark.parametrize("exists", [False, True])
def test_a_link_on_the_way(place: Path, answers: Answers, exists: bool) -> None:
    """Scratch directories are links on most clusters: paths lead where they say from both ends."""
    (place / "far/away").mkdir(parents=True)
    (place / "link").symlink_to("far/away")
    if exists:
        (place / "far/away/project").mkdir()
    write(answers, Path("link/project"))
    loaded = config.load(place / "far/away/project/config/config.yaml")
    assert loaded.data.train == ("../../../train.jsonl",)
    assert snakemake("-n", cwd=place / "far/away/project").returncode == 0
    assert project.read_project(Path("link/project")) == answers
    # `..` after a link in the data's own path
    (place / "far/data.jsonl").write_bytes((place / "train.jsonl").read_bytes())
    moved = emit.relocate(
        Answers.model_validate({"data": {"train": ["link/../data.jsonl"]}}), place, place / "p"
    )
    assert moved.data.train == ("../far/data.jsonl",)


def test_an_empty_directory_in_one_that_is_not_ours(place: Path, answers: Answers) -> None:
    """A mount, or a directory that an administrator made: nothing is written beside it."""
    (place / "theirs/mine").mkdir(parents=True)
    watched = place / "theirs"
    made_before = watched.stat().st_mtime_ns
    write(answers, watched / "mine")
    assert watched.stat().st_mtime_ns == made_before
    assert sorted(path.name for path in (watched / "mine").iterdir()) == [
        *(".gitignore", "README.md", "Snakefile", "config", "local", "profiles", "rules", "slurm")
    ]


def test_hub_id_stays_one_where_a_directory_is_called_so(place: Path, answers: Answers) -> None:
    named = answers.model_copy(
        update={"model": answers.model.model_copy(update={"source": "owner/name"})}
    )
    moved = emit.relocate(named, place, place / "p")
    assert moved.model.source == "owner/name"
    (place / "owner/name").mkdir(parents=True)
    assert emit.relocate(moved, place / "p", place).model.source == "owner/name"
    assert emit.relocate(named, place, place / "p").model.source == "../owner/name"


def test_names_entered_in_the_profile_come_back(place: Path, answers: Answers) -> None:
    write(answers, place / "project")
    file = place / "project/profiles/slurm/config.yaml"
    file.write_text(file.read_text().replace("'input'", "h200-long"))
    assert project.read_project(place / "project").where.partition == "h200-long"


def test_a_parent_that_does_not_exist_yet(place: Path, answers: Answers) -> None:
    """`new/..` is the current directory, which holds something else."""
    before = contents(place)
    with pytest.raises(Ms4Error, match="holds something that is not an ms4 project"):
        write(answers, Path("new/.."))
    assert contents(place) == before
    assert not (place / "new").exists()


def test_a_killed_update_is_no_edit(
    place: Path, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was half written is known as ours; other answers can be written over it."""
    root = place / "project"
    write(answers, root)
    other = answers.model_copy(
        update={"seed": 5, "adapters": answers.adapters.model_copy(update={"rank": 3})}
    )
    whole = project._apply

    def killed(directory: Path, change: project.Change) -> None:
        if change.name == "README.md":
            raise KeyboardInterrupt
        whole(directory, change)

    with monkeypatch.context() as patch:
        patch.setattr(project, "_apply", killed)
        with pytest.raises(KeyboardInterrupt):
            write(other, root)
    assert "seed: 5" in (root / "config/config.yaml").read_text()
    write(answers.model_copy(update={"seed": 6}), root)
    write(answers, place / "fresh")
    write(answers, root)
    assert contents(root) == contents(place / "fresh")


def test_what_is_in_the_way_of_a_link_is_named(place: Path, answers: Answers) -> None:
    write(answers, place / "project")
    (place / "project/slurm").unlink()
    (place / "project/slurm").write_text("profiles/slurm")
    before = contents(place)
    with pytest.raises(Ms4Error, match=r"project/slurm: is a file, but a link to profiles/slurm"):
        write(answers.model_copy(update={"seed": 5}), place / "project")
    assert contents(place) == before


# Reading it again.


def test_answers_come_back(place: Path, answers: Answers) -> None:
    write(answers, place / "deep/project")
    assert project.read_project(place / "deep/project") == answers


def test_edited_configuration_is_what_comes_back(place: Path, answers: Answers) -> None:
    write(answers, place / "project")
    file = place / "project/config/config.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: 99"))
    assert project.read_project(place / "project").seed == 99
    file.write_text(file.read_text().replace("seed: 99", "seed: many"))
    with pytest.raises(Ms4Error, match=r"config\.yaml:\d+: seed: Input should be a valid integer"):
        project.read_project(place / "project")


@pytest.mark.parametrize("note", ["[]", "{}", '{"files": {"a": 1}, "where": {}}', "{"])
def test_damaged_note(place: Path, answers: Answers, note: str) -> None:
    write(answers, place / "project")
    (place / "project/config/project.json").write_text(note)
    with pytest.raises(Ms4Error, match=r"project\.json: not the note .*Restore it"):
        project.read_project(place / "project")


# The version that wrote it.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "message"),
    [
        (ms4.__version__, None),
        (ms4.__version__ + ".post1", None),
        ("9.7.1", "ms4 9.7.1 wrote this project's rules, but ms4 "),
        (None, "names no `ms4_version`. Restore it"),
    ],
)
def test_version_is_checked_by_the_rules(
    place: Path, answers: Answers, version: str | None, message: str | None
) -> None:
    write(answers, place / "project")
    file = place / "project/config/project.json"
    note = json.loads(file.read_text())
    note["ms4_version"] = version
    file.write_text(json.dumps(note))
    answer = snakemake("-n", cwd=place / "project")
    assert answer.returncode == (1 if message else 0), answer.stdout
    assert "Traceback" not in answer.stdout
    if message:
        assert message in answer.stdout
    if version is not None:
        write(answers, place / "project")  # as the message says
        assert snakemake("-n", cwd=place / "project").returncode == 0
